"""The exact LRU hit rate at every capacity, in one pass (Mattson's stack algorithm on paths).

Leaf-first LRU keeps, of all pages ordered by last use with a request's deeper pages older than its shallower ones, the
first `capacity` ones. So a page is found at every capacity above its distance: the number of pages used since.

    live[r]    pages whose last user is request r                   Fenwick tree over requests
    a run of source r:   distance of its first page  =  sum of live[r'] for r' > r,  then one more for each page below

Along a run distances are consecutive, so a run adds a constant to a range of the distance histogram: two entries of its
difference array. Deeper pages cost more to prefill; depth minus distance is the same all along a run, so a second
difference array gives the spared attention exactly as well.

Source: R. L. Mattson et al., Evaluation techniques for storage hierarchies, IBM Systems Journal 9(2), 1970.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from radixkv.replay.reuse import Reuse
from radixkv.replay.rows import HitCount, Row
from radixkv.replay.workload import Workload

__all__ = ["Curve", "lru_curve"]

Column = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """LRU's hits at every capacity.

    Attributes:
        workload: whose.
        hit_pages: [num_pages + 1] pages found at a capacity of so many pages; constant beyond.
        hit_pairs: [num_pages + 1] (query, key) pairs that the cached prefixes spared.
    """

    workload: Workload
    hit_pages: Column
    hit_pairs: Column

    def page_hit_rate(self, capacity_pages: int) -> float:
        """Hit pages / whole pages of all prompts, at one capacity."""
        total = self.workload.num_input_pages
        return self._at(self.hit_pages, capacity_pages) / total if total else 0.0

    def row(self, capacity_pages: int) -> Row:
        """What the replay of `lru` would count at one capacity; evictions and hit requests are not known: 0."""
        pairs = self._at(self.hit_pairs, capacity_pages)
        hits = HitCount(self.workload.page_size, self._at(self.hit_pages, capacity_pages), pairs)
        return Row.of(self.workload, "lru curve", capacity_pages, hits, evicted_pages=0, cpu_s=0.0)

    def knots(self, count: int = 120) -> Sequence[int]:
        """Capacities for a drawing: `count` at most, closer together where small, the footprint the last."""
        last = len(self.hit_pages) - 1
        spread = np.geomspace(max(last // 1000, 1), max(last, 1), count)
        return sorted({int(value) for value in spread.round()})

    @staticmethod
    def _at(column: Column, capacity_pages: int) -> int:
        return int(column[min(max(capacity_pages, 0), len(column) - 1)])


def lru_curve(workload: Workload, reuse: Reuse) -> Curve:
    """The whole curve.

    Cost: O(runs x log requests), then O(distinct pages). Memory: 16 B a distinct page, twice that while it is made.
    """
    # index d + 1 is distance d, which is found from capacity d + 1 on
    pages, pairs = np.zeros(workload.num_pages + 2, np.int64), np.zeros(workload.num_pages + 2, np.int64)
    if len(reuse.source):
        first = np.array(_distances(workload, reuse), np.int64) + 1
        end = first + reuse.stop - reuse.start
        below = reuse.start - first
        for steps, change in ((pages, np.int64(1)), (pairs, below)):
            np.add.at(steps, first, change)
            np.add.at(steps, end, -change)
            np.cumsum(steps, out=steps)
    # a page at depth i spares S tokens of S * i earlier ones each, and the pairs within itself
    width = workload.page_size
    pairs += pages * np.arange(len(pages))  # now the sum of depths at each distance
    pairs *= width * width
    pairs += pages * (width * (width + 1) // 2)
    np.cumsum(pages, out=pages)
    np.cumsum(pairs, out=pairs)
    return Curve(workload, pages[:-1], pairs[:-1])


def _distances(workload: Workload, reuse: Reuse) -> list[int]:
    """[runs] how many pages were used since the first page of each run was."""
    lengths = workload.lengths
    num_requests = len(lengths)
    fenwick = [0] * (num_requests + 1)
    total, done, index = 0, 0, 0
    sources, targets = reuse.source.tolist(), reuse.target.tolist()
    sizes = (reuse.stop - reuse.start).tolist()
    result: list[int] = []
    while index < len(targets):
        target = targets[index]
        for request in range(done, target):  # their pages are live from now on
            _add(fenwick, request, lengths[request])
            total += lengths[request]
        done = target
        first = index
        while index < len(targets) and targets[index] == target:
            result.append(total - _sum(fenwick, sources[index]))
            index += 1
        for run in range(first, index):  # and these are the target's now
            _add(fenwick, sources[run], -sizes[run])
            total -= sizes[run]
    return result


def _add(fenwick: list[int], index: int, value: int) -> None:
    index += 1
    while index < len(fenwick):
        fenwick[index] += value
        index += index & -index


def _sum(fenwick: list[int], index: int) -> int:
    """The sum of entries 0 to `index`."""
    index += 1
    total = 0
    while index:
        total += fenwick[index]
        index &= index - 1
    return total
