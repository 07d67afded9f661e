"""How many tokens of each prompt must hit where nothing is evicted, by other means than a tree.

All prompts so far, cut to whole stored pages, stand in one sorted list. The one that shares the longest prefix with a
new prompt is one of its two neighbours there, so two compares tell the answer.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from sortedcontainers import SortedList

from bench.index.workloads import Request

TOKEN_BYTES = 4


def expected_hits(requests: Iterable[Request], page_size: int, *, exact: bool, keep_last: bool = False) -> list[int]:
    """Hit tokens of each request, each inserted whole before the next one comes.

    Args:
        requests: in order.
        page_size: what is stored is cut to whole pages of so many tokens.
        exact: whether a hit may end inside a stored page.
        keep_last: whether the prompt's last token never counts as a hit, as where its logits are needed.
    """
    stored: SortedList[bytes] = SortedList()
    found = []
    for request in requests:
        prompt = request.prompt.tobytes()
        place = stored.bisect_left(prompt)
        near = [stored[i] for i in (place - 1, place) if 0 <= i < len(stored)]
        hit = max((_common_tokens(prompt, other) for other in near), default=0)
        if keep_last:
            hit = min(hit, len(request.prompt) - 1)
        found.append(hit if exact else hit - hit % page_size)
        kept = prompt[: len(prompt) - len(prompt) % (page_size * TOKEN_BYTES)]
        if not near or kept not in near:
            stored.add(kept)
    return found


def _common_tokens(one: bytes, other: bytes) -> int:
    """Leading tokens that two sequences share. A neighbour by bytes is a neighbour by whole tokens too."""
    length = min(len(one), len(other))
    left, right = np.frombuffer(one[:length], np.int32), np.frombuffer(other[:length], np.int32)
    differs = left != right
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length // TOKEN_BYTES
