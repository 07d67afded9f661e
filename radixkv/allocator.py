"""Where pages come from: free ones first, then those that the policy gives up.

allocate(n) ─▶ n pages            evict(n) ─▶ leaf tails, in the policy's order, until n pages are free
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from radixkv.errors import ConfigError, PoolExhausted
from radixkv.node import Account
from radixkv.pages import PagePool
from radixkv.policies import POLICIES, Policy
from radixkv.tree import RadixTree

__all__ = ["Allocator"]


class Allocator:
    """The pool, the tree, and the policy between them.

    Not thread-safe: its owner (`PrefixCache`) serialises the calls.

    Args:
        num_pages: pages in the pool, >= 1.
        page_size: tokens in a page.
        policy: the eviction policy's name.
        on_evicted: called with whose, from which position of the path on, which pages were evicted, and the tick they were
            last used at.

    Raises:
        ConfigError: no such policy, or no pages.
    """

    __slots__ = ("_on_evicted", "policy", "pool", "tree")

    def __init__(
        self, num_pages: int, page_size: int, policy: str, on_evicted: Callable[[Account, int, array[int], int], None]
    ) -> None:
        self.pool = PagePool(num_pages)
        self.policy = _policy(policy, self.pool.num_pages)
        self.tree = RadixTree(page_size, self.policy)
        self.tree.merges = self.policy.merges
        self._on_evicted = on_evicted

    def set_policy(self, policy: str) -> None:
        """Hand every evictable leaf to another policy, oldest first. Cost: O(n log n) of the leaves, O(nodes)."""
        new = _policy(policy, self.pool.num_pages)
        leaves = [node for node in self.tree.walk() if node in self.policy]
        for leaf in sorted(leaves, key=lambda leaf: leaf.tick):
            new.add(leaf)
        self.policy = self.tree.order = new
        self.tree.merges = new.merges

    def require(self, num_pages: int, evictable: int, leased: int) -> None:
        """Raise where so many pages cannot be had.

        Raises:
            PoolExhausted: fewer are free or evictable.
        """
        if num_pages - self.pool.num_free > evictable:
            raise PoolExhausted(num_pages, self.pool.num_free, evictable, leased)

    def allocate(self, num_pages: int) -> array[int]:
        """Take `num_pages` pages. The caller has made sure that so many are free or evictable."""
        missing = num_pages - self.pool.num_free
        if missing > 0:
            self.evict(missing)
        return self.pool.allocate(num_pages)

    def evict(self, num_pages: int) -> int:
        """Free up to `num_pages` pages of victims; returns how many. Cost: the policy's, and O(pages)."""
        taken = 0
        while taken < num_pages:
            leaf = self.policy.victim()
            if leaf is None:
                break
            tick = leaf.tick
            pages = self.tree.trim(leaf, num_pages - taken)
            self.pool.free(pages)
            taken += len(pages)
            self._on_evicted(leaf.account, leaf.end if leaf.alive else leaf.start, pages, tick)
        return taken


def _policy(name: str, num_pages: int) -> Policy:
    if name not in POLICIES:
        raise ConfigError("policy", name, f"one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name](num_pages)
