"""Which requests share which pages: page tables in, a tree of common runs out. Plain numpy, no device.

Requests that share a prefix share its pages, so their page tables begin alike. Sorted, they form a tree:

    request 0   7 3 9 │ 4 4b            run {0, 1, 2}   pages 7 3 9      read once for all three
    request 1   7 3 9 │ 5 │ 8     ──▶     run {1, 2}    page 5           read once for both
    request 2   7 3 9 │ 5 │ 6             own tails     4 4b   8   6     read by each
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from radixkv_kernels.work import Ints, Longs

__all__ = ["SharedRun", "Sharing", "find_shared"]


@dataclass(frozen=True, slots=True)
class SharedRun:
    """Keys [begin, end) that several requests have in common; both ends are ends of pages.

    Attributes:
        members: numbers of the requests.
        begin, end: keys.
        parents: numbers of the runs that lie before it in all of its members, outermost first.
    """

    members: list[int]
    begin: int
    end: int
    parents: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sharing:
    """Who shares what.

    Attributes:
        runs: parents before children.
        begins: [R] where what each request has for itself begins.
        parents: the runs that each request is in, outermost first; none for those left out.
    """

    runs: list[SharedRun]
    begins: Longs
    parents: dict[int, tuple[int, ...]]


def find_shared(tables: Mapping[int, Ints], num_requests: int, page_size: int, least_saving: int) -> Sharing:
    """Find the runs of pages that are worth reading once for several requests.

    Cost: O(pages + requests log requests), mostly in bulk.

    Args:
        tables: by request, the pages that all of its query rows see all of; those of others are not shared.
        num_requests: R.
        page_size: tokens of a page.
        least_saving: tokens for each who shares; where less is saved, everybody reads a run for himself.
    """
    begins, runs, parents_of = np.zeros(num_requests, np.int64), list[SharedRun](), dict[int, tuple[int, ...]]()
    if len(tables) < 2:
        return Sharing(runs, begins, parents_of)
    ordered = sorted(tables, key=lambda i: tables[i].astype(">i4").tobytes())
    common = [_common(tables[a], tables[b]) * page_size for a, b in itertools.pairwise(ordered)]
    stack: list[tuple[int, int, int, tuple[int, ...]]] = [
        (0, len(ordered), 0, ())
    ]  # a range of `ordered`, what is read of it
    while stack:
        low, high, begin, parents = stack.pop()
        if high - low == 1:
            begins[ordered[low]], parents_of[ordered[low]] = begin, parents
            continue
        end = min(common[low : high - 1])
        if (end - begin) * (high - low - 1) >= least_saving * (high - low):
            runs.append(SharedRun(ordered[low:high], begin, end, parents))
            begin, parents = end, (*parents, len(runs) - 1)
        cuts = [low, *(k + 1 for k in range(low, high - 1) if common[k] == end), high]
        stack += [(a, b, begin, parents) for a, b in itertools.pairwise(cuts)]
    return Sharing(runs, begins, parents_of)


def _common(left: Ints, right: Ints) -> int:
    """How many leading pages are the same."""
    count = min(len(left), len(right))
    differ = left[:count] != right[:count]
    first = int(differ.argmax()) if count else 0
    return first if count and differ[first] else count
