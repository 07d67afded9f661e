"""Requests to send, out of a recorded trace: who comes when, with which tokens, and how long an answer.

trace ─▶ whole conversations, drawn by a seed ─▶ lengths / scale ─▶ tokens of every hash id ─▶ gaps stretched to a rate

The same hash id gives the same tokens, so prompts share exactly the prefixes that they shared when they were recorded. A
conversation is drawn whole or not at all, so a sample has the reuse of the trace (conversation: those that share their
second block; the first is the same everywhere).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from radixkv.replay.formats import TraceRequest, read_trace

TRACE = Path(__file__).parents[2] / "tests/data/traces/conversation_trace.jsonl.gz"
_LOWEST, _HIGHEST = 100, 40_000  # plain tokens of every vocabulary here
_TAIL = 1 << 32  # seeds of what no hash id covers lie above all hash ids


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request.

    Attributes:
        at_s: when it is sent, from the start.
        prompt: its token ids.
        max_tokens: of its answer, all of which are generated.
        shared_tokens: of the prompt, those in blocks that an earlier request had: what an endless cache would find.
    """

    at_s: float
    prompt: list[int]
    max_tokens: int
    shared_tokens: int


def draw(trace: Path, num_requests: int, scale: int, max_context: int, seed: int) -> list[Arrival]:
    """Draw conversations until there are so many requests; `at_s` is the trace's own clock, from the first one.

    Raises:
        ValueError: a scale that does not divide the trace's blocks, or nothing that fits the context.
    """
    requests = list(read_trace(trace))
    if requests[0].block_tokens % scale:
        raise ValueError(f"--scale {scale}: must divide the trace's blocks of {requests[0].block_tokens} tokens")
    chosen = sorted(_conversations(requests, num_requests, seed))
    arrivals: list[Arrival] = []
    seen: set[int] = set()
    for index in chosen:
        request = requests[index]
        num_prompt, num_output = max(request.num_input_tokens // scale, 1), max(request.num_output_tokens // scale, 1)
        if num_prompt + num_output > max_context:
            continue
        blocks = request.blocks.tolist()
        known = next((at for at, block in enumerate(blocks) if block not in seen), len(blocks))
        seen.update(blocks)
        shared = min(known * (request.block_tokens // scale), num_prompt - 1)
        prompt = _prompt(blocks, request.block_tokens // scale, num_prompt, seed, index)
        arrivals.append(Arrival(request.time_s, prompt, num_output, shared))
    if not arrivals:
        raise ValueError(f"--scale {scale}: no request fits a context of {max_context} tokens")
    return [replace(one, at_s=one.at_s - arrivals[0].at_s) for one in arrivals]


def at_rate(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same requests, all gaps stretched by one factor, so that `rate` come a second on average."""
    length_s = arrivals[-1].at_s or 1.0
    factor = len(arrivals) / rate / length_s
    return [replace(one, at_s=one.at_s * factor) for one in arrivals]


def _conversations(requests: Sequence[TraceRequest], num_requests: int, seed: int) -> list[int]:
    """Indices of the requests of conversations drawn at random."""
    members: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        members.setdefault(int(request.blocks[1]) if len(request.blocks) > 1 else -1 - index, []).append(index)
    groups = list(members.values())
    chosen: list[int] = []
    for at in np.random.default_rng(seed).permutation(len(groups)):
        chosen += groups[at]
        if len(chosen) >= num_requests:
            break
    return chosen[:num_requests]


def _prompt(blocks: Sequence[int], block_tokens: int, num_tokens: int, seed: int, index: int) -> list[int]:
    """Tokens of the blocks, then of a tail that nobody else has."""
    ids = [token for block in blocks for token in _tokens(seed, block, block_tokens)][:num_tokens]
    return ids + list(_tokens(seed, _TAIL + index, num_tokens - len(ids)))


@lru_cache(maxsize=200_000)
def _tokens(seed: int, key: int, count: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng((seed, key)).integers(_LOWEST, _HIGHEST, count).tolist())
