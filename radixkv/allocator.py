"""Where pages come from: free ones first, then those that the policy gives up.

allocate(n) ─▶ n pages            evict(n) ─▶ leaf tails, in the policy's order, until n pages are free
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial

from radixkv.errors import ConfigError, PoolExhausted
from radixkv.node import Account, Node
from radixkv.pages import PagePool
from radixkv.policies import POLICIES, Levels, Policy
from radixkv.quota import Quota, Quotas
from radixkv.tree import RadixTree

__all__ = ["Allocator"]


class Allocator:
    """The pool, the tree, and the policy between them.

    Not thread-safe: its owner (`PrefixCache`) serialises the calls.

    Args:
        num_pages: pages in the pool, >= 1.
        page_size: tokens in a page.
        policy: the eviction policy's name.
        clock: seconds, as the nodes' `time_s`.

    Attributes:
        levels: the policy, where it orders by level and namespace: from the first retention or quota on.
        quotas: what namespaces may hold; None while nobody has a quota.
        num_pinnable: pages that pins may take, which reservations have to leave.
        on_evicted: called with whose, from which position of the path on, which pages were evicted, and the tick they were
            last used at.

    Raises:
        ConfigError: no such policy, or no pages.
    """

    __slots__ = ("_clock", "_fresh", "levels", "num_pinnable", "on_evicted", "policy", "pool", "quotas", "tree")

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        policy: str,
        clock: Callable[[], float],
    ) -> None:
        self.pool = PagePool(num_pages)
        self._clock = clock
        self._fresh = _maker(policy, self.pool.num_pages)
        self.policy = self._fresh()
        self.levels = self._levels_of(self.policy)
        self.num_pinnable = 0
        self.quotas: Quotas | None = None
        self.tree = RadixTree(page_size, self.policy)
        self.tree.merges = self.policy.merges
        self.on_evicted: Callable[[Account, int, array[int], int], None] = _untold

    def set_policy(self, policy: str) -> None:
        """Hand every evictable leaf to another policy, oldest first. Cost: O(n log n) of the leaves, O(nodes)."""
        fresh = _maker(policy, self.pool.num_pages)
        leaves = self._leaves(None)
        self._fresh, self.policy = fresh, fresh()
        levels, self.levels = self.levels, self._levels_of(self.policy)
        if levels is not None:
            levels = self.use_levels()
            for key, quota in self.quotas.items() if self.quotas is not None else ():
                levels.set_group(key, quota.reserved_pages, ())
        for leaf in sorted(leaves, key=_tick):
            self.policy.add(leaf)
        self.tree.order = self.policy
        self.tree.merges = self.policy.merges

    def use_levels(self) -> Levels:
        """Order by level and namespace from now on; what the policy holds stays in it. Cost: O(1)."""
        if self.levels is None:
            self.levels = Levels(self.policy, self._fresh, self._clock)
            self.policy = self.tree.order = self.levels
        return self.levels

    def set_quota(self, key: bytes, quota: Quota) -> None:
        """Limit a namespace from the next allocation on. Cost: O(n log n) of its leaves, O(its nodes).

        Raises:
            ConfigError: the reservations do not fit together.
        """
        quotas = self.quotas if self.quotas is not None else Quotas(self.pool.num_pages, self.num_pinnable)
        known = quotas.get(key) is not None
        kept = quotas.set(key, quota)
        leaves = self._leaves(key) if kept != known else []
        if kept:
            self.use_levels().set_group(key, quota.reserved_pages, leaves)
        elif known:
            self.use_levels().drop_group(key, leaves)
        self.quotas = quotas if quotas.all() else None

    def _levels_of(self, policy: Policy) -> Levels | None:
        if not isinstance(policy, Levels):
            return None
        policy.set_clock(self._clock)
        return policy

    def _leaves(self, key: bytes | None) -> list[Node]:
        """The evictable leaves, all or a namespace's. Cost: O(nodes)."""
        root = self.tree.roots.get(key) if key is not None else None
        if key is not None and root is None:
            return []
        return [node for node in self.tree.walk(root) if node in self.policy]

    def require(self, num_pages: int, evictable: int, leased: int, pinned: int) -> None:
        """Raise where so many pages cannot be had.

        Raises:
            PoolExhausted: fewer are free or evictable.
        """
        if num_pages - self.pool.num_free > evictable:
            raise PoolExhausted(num_pages, self.pool.num_free, evictable, leased, pinned)

    def allocate(self, num_pages: int) -> array[int]:
        """Take `num_pages` pages. The caller has made sure that so many are free or evictable."""
        missing = num_pages - self.pool.num_free
        if missing > 0:
            self.evict(missing)
        return self.pool.allocate(num_pages)

    def evict(self, num_pages: int) -> int:
        """Free up to `num_pages` pages of victims; returns how many. Cost: the policy's, and O(pages)."""
        if self.quotas is not None:
            return self.evict_for(num_pages, None)
        taken = 0
        while taken < num_pages:
            leaf = self.policy.victim()
            if leaf is None:
                break
            taken += self._trim(leaf, num_pages - taken)
        return taken

    def evict_for(self, num_pages: int, asker: Account | None) -> int:
        """As `evict`, for a request of `asker` (None: nobody's), sparing what others have reserved."""
        levels, quotas = self.levels, self.quotas
        assert levels is not None and quotas is not None
        taken = 0
        while taken < num_pages:
            leaf = levels.victim_for(asker)
            if leaf is None:
                break
            taken += self._trim(leaf, min(num_pages - taken, quotas.spare(leaf.account, asker)))
        return taken

    def evict_of(self, num_pages: int, account: Account) -> int:
        """As `evict`, but only leaves of a namespace with a quota."""
        assert self.levels is not None
        taken = 0
        while taken < num_pages:
            leaf = self.levels.victim_of(account.key)
            if leaf is None:
                break
            taken += self._trim(leaf, num_pages - taken)
        return taken

    def _trim(self, leaf: Node, num_pages: int) -> int:
        """Free up to `num_pages` pages off the end of an evictable leaf; returns how many."""
        tick = leaf.tick
        pages = self.tree.trim(leaf, num_pages)
        self.pool.free(pages)
        self.on_evicted(leaf.account, leaf.end if leaf.alive else leaf.start, pages, tick)
        return len(pages)


def _maker(name: str, num_pages: int) -> Callable[[], Policy]:
    if name not in POLICIES:
        raise ConfigError("policy", name, f"one of {', '.join(sorted(POLICIES))}")
    return partial(POLICIES[name], num_pages)


def _untold(account: Account, start: int, pages: array[int], last_tick: int) -> None:
    """What is evicted before anybody asked to be told."""


def _tick(leaf: Node) -> int:
    return leaf.tick
