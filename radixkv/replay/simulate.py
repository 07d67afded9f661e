"""Replay a workload through the real PrefixCache.

    per request, at its arrival:   acquire ─▶ extend ─▶ commit ─▶ release

One page of the cache stands for one page of the workload: the cache runs with one token a page, and that token is the
page's id. What is exercised is the product's own tree, pool, leases and policy, at the price of its index alone.

One lease lives at a time, so everything but its own path can be evicted, and of a prompt longer than the whole cache
exactly the first `capacity_pages` pages fit: the tail is left out beforehand, which is what an engine would keep after
PoolExhausted. Answers are not inserted (they come back as the next turn's prompt), and no request holds its path while
others arrive: both as in the study (eviction.md), whose numbers this reproduces.
"""

from __future__ import annotations

from collections.abc import Callable
from time import thread_time
from typing import Any

from radixkv.cache import PrefixCache
from radixkv.errors import ConfigError
from radixkv.replay.rows import HitCount, Row
from radixkv.replay.workload import Workload

__all__ = ["simulate"]

_REPORT_EVERY = 128  # requests


def simulate(
    workload: Workload,
    policy: str,
    capacity_pages: int,
    *,
    check_every: int = 0,
    tags: Callable[[int], int] | None = None,
    on_requests: Callable[[int], None] | None = None,
) -> Row:
    """Replay `workload` under `policy` with `capacity_pages` pages.

    Cost: two walks of the tree a request, 20 to 50 us, and the evictions.

    Args:
        workload: what is asked.
        policy: a name of `radixkv.policies.POLICIES`.
        capacity_pages: pages of the cache, >= 1.
        check_every: recount every invariant after so many requests, and at the end; 0: at the end only. The time this
            takes is not counted.
        tags: gives request number i (from 0) an opaque small int, handed to `acquire(..., tag=)`; without it no tag is
            passed. `Reuse.continued` knows which requests a later one continues.
        on_requests: called now and then with how many more requests were replayed.

    Raises:
        ConfigError: unknown policy, or no pages. InvariantError: a check failed.
    """
    if capacity_pages < 1:
        raise ConfigError("capacity_pages", capacity_pages, "at least 1")
    number = 0
    cache = PrefixCache(capacity_pages, page_size=1, policy=policy, clock=lambda: workload.times[number])
    acquire: Callable[..., Any] = cache.acquire
    hits = HitCount(workload.page_size)
    check_s, start = 0.0, thread_time()
    for number, path in enumerate(workload.paths(capacity_pages)):
        lease = acquire(path) if tags is None else acquire(path, tag=tags(number))
        hits.add(lease.num_matched)
        lease.extend()
        lease.commit()
        lease.release()
        if on_requests is not None and number % _REPORT_EVERY == _REPORT_EVERY - 1:
            on_requests(_REPORT_EVERY)
        if check_every and number % check_every == check_every - 1:
            check_s += _checked(cache)
    cpu_s = thread_time() - start - check_s
    _checked(cache)
    return Row.of(workload, policy, capacity_pages, hits, evicted_pages=cache.stats().evicted_pages, cpu_s=cpu_s)


def _checked(cache: PrefixCache) -> float:
    """Run `check()`; how much CPU time it took."""
    start = thread_time()
    cache.check()
    return thread_time() - start
