"""A guard for policies that learn: what plain LRU would have hit, and whether to trust anything else.

LRU needs no second cache to be known. Its pages, by the request that used them last, are one run of each request's path,
oldest requests first; an eviction shortens the oldest run. So a count a request is all there is, exact but for pages that
leave by other means, of which it is not told (docs/design/0007-auto.md):

    request     4      5      7                  capacity 9, the next one comes with 4 pages of its own
    pages    [2, 6) [0, 1) [3, 7)      ─▶      5: [0, 1)   7: [3, 7)   8: [0, 4)           4's run is gone
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from math import sqrt

from radixkv.policies.history import Run

__all__ = ["Guard", "LruShadow"]


class LruShadow:
    """How many pages of each request least-recently-used eviction would have found.

    Args:
        num_pages: pages of the cache.

    Memory: some 200 B for each request that still has a page, at most one for each page.
    """

    __slots__ = ("_free", "_kept", "_num_pages")

    def __init__(self, num_pages: int) -> None:
        self._num_pages = self._free = num_pages
        self._kept: OrderedDict[int, tuple[int, int]] = OrderedDict()  # request -> its pages [start, stop)

    def touch(self, request: int, runs: Iterable[Run], num_pages: int) -> int:
        """`request` used a path of `num_pages` pages, of which `runs` were used before; how many were a hit.

        Cost: O(runs), and O(1) amortised for evictions.
        """
        length = min(num_pages, self._num_pages)
        hits = 0
        for source, start, stop in runs:
            first, end = self._kept.get(source, (0, 0))
            taken = min(stop, end, length)
            if taken > max(start, first):
                if hits == start:
                    hits = taken
                self._free += taken - first
                if taken < end:
                    self._kept[source] = (taken, end)
                else:
                    del self._kept[source]
        self._free -= length
        if length:
            self._kept[request] = (0, length)
        while self._free < 0:
            source, (first, end) = next(iter(self._kept.items()))
            cut = min(-self._free, end - first)
            self._free += cut
            if first + cut == end:
                del self._kept[source]
            else:
                self._kept[source] = (first, end - cut)
        return hits


class Guard:
    """Trusts a policy until it is behind LRU by more than chance explains; then waits, each time twice as long.

    The difference in hits, request by request, is a walk whose variance is the sum of its squared steps. Both sums
    forget with a half-life, so what was won long ago pays for nothing.

    Args:
        half_life: requests after which a difference counts half.
        sigmas: how many standard deviations behind is too much.

    Attributes:
        trusted: whether the policy rules; LRU does otherwise.
    """

    __slots__ = ("_decay", "_gain", "_longest", "_pause", "_resting", "_sigmas", "_variance", "trusted")

    def __init__(self, half_life: int = 1000, sigmas: float = 2.0) -> None:
        self._decay = 0.5 ** (1 / half_life)
        self._sigmas = sigmas
        self._gain = self._variance = 0.0
        self._pause, self._longest, self._resting = half_life, 64 * half_life, 0
        self.trusted = True

    def note(self, num_found: int, num_lru: int) -> None:
        """A request found so many pages, and would have found so many under LRU. Cost: O(1)."""
        if not self.trusted:
            self._resting -= 1
            if self._resting <= 0:
                self.trusted, self._gain, self._variance = True, 0.0, 0.0
            return
        difference = num_found - num_lru
        self._gain = self._gain * self._decay + difference
        self._variance = self._variance * self._decay + difference * difference
        if self._gain < -self._sigmas * sqrt(self._variance):
            self.trusted, self._resting = False, self._pause
            self._pause = min(2 * self._pause, self._longest)
