"""CacheStats: where every page of a cache is, and what its look-ups found."""

from __future__ import annotations

from typing import NamedTuple

from radixkv.allocator import Allocator
from radixkv.leasing import Leasing

__all__ = ["CacheStats", "stats_of"]


class CacheStats(NamedTuple):
    """Where every page is, and what the look-ups found.

    free + evictable + locked + leased = num_pages; pinned pages are locked ones.
    """

    num_pages: int
    page_size: int
    num_free: int
    num_evictable: int
    num_locked: int
    num_leased: int
    num_nodes: int
    num_leases: int
    num_namespaces: int
    lookups: int
    lookup_tokens: int
    hit_tokens: int
    evicted_pages: int
    num_pinned: int

    @property
    def hit_rate(self) -> float:
        """Matched tokens / looked-up tokens."""
        return self.hit_tokens / self.lookup_tokens if self.lookup_tokens else 0.0


def stats_of(allocator: Allocator, leasing: Leasing) -> CacheStats:
    """Counts, all exact. Cost: O(1)."""
    pool, tree = allocator.pool, allocator.tree
    return CacheStats(
        num_pages=pool.num_pages,
        page_size=tree.page_size,
        num_free=pool.num_free,
        num_evictable=tree.num_evictable,
        num_locked=tree.num_pages - tree.num_evictable,
        num_leased=leasing.num_leased,
        num_nodes=tree.num_nodes,
        num_leases=len(leasing.leases),
        num_namespaces=len(tree.roots),
        lookups=leasing.num_lookups,
        lookup_tokens=leasing.num_lookup_tokens,
        hit_tokens=leasing.num_hit_tokens,
        evicted_pages=leasing.num_evicted,
        num_pinned=leasing.pins.num_pages,
    )
