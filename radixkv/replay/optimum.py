"""MIN: the most a cache of this size could have hit, knowing the future (Belady, on paths).

Evict the page whose next use is furthest, the deeper of two with one next use; the current request's path stays, and
all of it enters. Every use of a page is a use of all pages above it, so the page this names is always a leaf: the
optimum over flat caches is reached by one that only evicts leaves.

The cache's pages fall into buckets by the request that uses them next. At any time a bucket is one run of its request's
path: what requests before it do not share with it is a tail, and evictions take from that tail's end. So a count is all
there is to a bucket: evicting lowers the count of the latest one, and when a request's turn comes its bucket is its
cached prefix. Nothing is done page by page.

Sources: L. A. Belady, IBM Systems Journal 5(2), 1966; the argument for trees is in the study (eviction.md, section 3).
"""

from __future__ import annotations

from heapq import heappop, heappush
from time import thread_time

from radixkv.errors import ConfigError
from radixkv.replay.reuse import Reuse
from radixkv.replay.rows import HitCount, Row
from radixkv.replay.workload import Workload

__all__ = ["optimum"]


def optimum(workload: Workload, reuse: Reuse, capacity_pages: int) -> Row:
    """The offline optimum at one capacity, as a row of policy "min".

    Cost: O(runs x log requests), a few us a request. Memory: about 300 B a run.

    Raises:
        ConfigError: no pages.
    """
    if capacity_pages < 1:
        raise ConfigError("capacity_pages", capacity_pages, "at least 1")
    start = thread_time()
    hits = HitCount(workload.page_size)
    bounds, runs = _by_source(workload, reuse)
    lengths = workload.lengths
    count = [0] * len(lengths)  # cached pages by the request that uses them next
    latest: list[int] = []  # heap of -request, for the buckets that are not empty and some that are
    never = resident = evicted = 0
    for number, length in enumerate(lengths):
        kept = min(length, capacity_pages)
        hits.add(count[number])
        resident += kept - count[number]
        count[number] = 0
        excess = max(resident - capacity_pages, 0)
        resident -= excess
        evicted += excess
        taken = min(never, excess)
        never, excess = never - taken, excess - taken
        while excess:
            bucket = -latest[0]
            taken = min(count[bucket], excess)
            count[bucket] -= taken
            excess -= taken
            if count[bucket] == 0:
                heappop(latest)
        covered = 0
        for target, first, stop in runs[bounds[number] : bounds[number + 1]]:
            covered = min(stop, kept)
            if covered > first:
                if count[target] == 0:
                    heappush(latest, -target)
                count[target] += covered - first
        never += kept - covered
    return Row.of(workload, "min", capacity_pages, hits, evicted_pages=evicted, cpu_s=thread_time() - start)


def _by_source(workload: Workload, reuse: Reuse) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Runs (target, start, stop) ordered by source and depth, and where each source's begin."""
    order = sorted(range(len(reuse.source)), key=lambda run: (reuse.source.item(run), reuse.start.item(run)))
    targets, starts, stops = reuse.target.tolist(), reuse.start.tolist(), reuse.stop.tolist()
    runs = [(targets[run], starts[run], stops[run]) for run in order]
    sizes = [0] * (workload.num_requests + 1)
    for source in reuse.source.tolist():
        sizes[source + 1] += 1
    for number in range(workload.num_requests):
        sizes[number + 1] += sizes[number]
    return sizes, runs
