"""Quotas and reservations: how much of the cache a namespace may hold, and how much of it others leave alone.

    pages of a namespace   tree ████████████ leases ███            tree + leases <= max_pages
                                ██████                             reserved_pages: others evict the tree no further

A quota is kept by evicting the namespace's own leaves, whatever everybody else does. A reservation protects what is
cached, from others and never from its own namespace; what is reserved and not used is free for all, and comes back as the
namespace's requests evict others' pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

from radixkv.errors import ConfigError, PoolExhausted, QuotaExceeded
from radixkv.namespace import Namespace
from radixkv.node import Account
from radixkv.tokens import as_count
from radixkv.tree import RadixTree

__all__ = ["Claim", "Quota", "Quotas", "Room", "Usage"]


@dataclass(frozen=True, slots=True)
class Quota:
    """The limits of one namespace.

    Attributes:
        namespace: whose, as it was given.
        max_pages: pages of its tree and of its leases, at most; None: as many as there are.
        reserved_pages: pages of its tree that others never evict.

    Raises:
        ConfigError: a negative number, or more reserved than it may hold.
    """

    namespace: str | Namespace
    max_pages: int | None = None
    reserved_pages: int = 0

    def __post_init__(self) -> None:
        if self.max_pages is not None:
            object.__setattr__(self, "max_pages", as_count("max_pages", self.max_pages))
            if self.max_pages < 0:
                raise ConfigError("max_pages", self.max_pages, "at least 0, or None for no limit")
        reserved = as_count("reserved_pages", self.reserved_pages)
        object.__setattr__(self, "reserved_pages", reserved)
        if reserved < 0:
            raise ConfigError("reserved_pages", reserved, "at least 0")
        if self.max_pages is not None and reserved > self.max_pages:
            raise ConfigError("reserved_pages", reserved, f"at most max_pages={self.max_pages}")


class Usage(NamedTuple):
    """What a namespace holds and may hold, in pages. `num_leased` pages are not yet in its tree of `num_pages`."""

    num_pages: int
    num_evictable: int
    num_leased: int
    max_pages: int | None
    reserved_pages: int


class Room(NamedTuple):
    """Pages that a request may evict: of its own namespace, and of all; and those that are reserved for others."""

    own: int
    total: int
    spared: int


class Claim(NamedTuple):
    """A request for `num_pages` pages: so many of its own have to go first, and so many are not free."""

    num_pages: int
    over: int
    missing: int

    def fits(self, room: Room) -> bool:
        """Whether evicting can make it good."""
        return self.over <= room.own and self.missing <= room.total


@final
class Quotas:
    """The quota of each namespace that has one.

    Args:
        num_pages: pages of the cache.
        num_pinnable: of these, how many pins may take: reservations must leave them, too.
    """

    __slots__ = ("_by_key", "_num_pages", "_num_pinnable")

    def __init__(self, num_pages: int, num_pinnable: int = 0) -> None:
        self._by_key: dict[bytes, Quota] = {}
        self._num_pages = num_pages
        self._num_pinnable = num_pinnable

    def set(self, key: bytes, quota: Quota) -> bool:
        """Keep a quota, or forget it where it limits nothing; whether it is kept. Cost: O(quotas).

        Raises:
            ConfigError: all reservations and the pins' budget together would leave no page for anybody else.
        """
        others = sum(other.reserved_pages for name, other in self._by_key.items() if name != key)
        most = max(self._num_pages - 1 - self._num_pinnable - others, 0)
        if quota.reserved_pages > most:
            expected = f"at most {most}, since {others} are reserved already and pins may take {self._num_pinnable}"
            raise ConfigError("reserved_pages", quota.reserved_pages, expected)
        if quota.max_pages is None and quota.reserved_pages == 0:
            self._by_key.pop(key, None)
            return False
        self._by_key[key] = quota
        return True

    def get(self, key: bytes) -> Quota | None:
        """The quota of a namespace, if it has one."""
        return self._by_key.get(key)

    def all(self) -> tuple[Quota, ...]:
        """Every quota, oldest first."""
        return tuple(self._by_key.values())

    def items(self) -> tuple[tuple[bytes, Quota], ...]:
        """Every namespace's key and quota."""
        return tuple(self._by_key.items())

    def claim(self, account: Account, num_pages: int, num_free: int) -> Claim:
        """What a request of a namespace for `num_pages` pages takes. Cost: O(1)."""
        quota = self._by_key.get(account.key)
        most = quota.max_pages if quota is not None else None
        over = 0 if most is None else account.num_pages + account.num_leased + num_pages - most
        return Claim(num_pages, max(over, 0), max(num_pages - num_free, 0))

    def room(self, tree: RadixTree, account: Account, used: Mapping[bytes, int] | None = None) -> Room:
        """What a request of a namespace may evict. Cost: O(quotas).

        Args:
            tree: the tree.
            account: the namespace's.
            used: pages of each namespace that leases and pins stand on. Without it what is locked counts, which is
                never less: locks may reach further than what is used.
        """
        total = tree.num_evictable if used is None else tree.num_pages - sum(used.values())
        spared = 0
        for key, quota in self._by_key.items():
            root = tree.roots.get(key)
            if quota.reserved_pages and root is not None and root.account is not account:
                evictable = _evictable(root.account, used)
                spared += max(evictable - self.spare(root.account, account), 0)
        return Room(_evictable(account, used), total - spared, spared)

    def refuse(self, account: Account, claim: Claim, room: Room, num_free: int, num_leased: int, num_pinned: int) -> None:
        """Raise where a claim does not fit.

        Raises:
            QuotaExceeded: the namespace's own pages do not suffice. PoolExhausted: all that it may evict do not.
        """
        quota = self._by_key.get(account.key)
        if claim.over > room.own and quota is not None and quota.max_pages is not None:
            used = account.num_pages + account.num_leased
            raise QuotaExceeded(quota.namespace, claim.num_pages, quota.max_pages, used, room.own)
        if claim.missing > room.total:
            raise PoolExhausted(claim.num_pages, num_free, room.total, num_leased, num_pinned, room.spared)

    def spare(self, account: Account, asker: Account | None) -> int:
        """Pages of a namespace's tree that a request of `asker` may evict, locked or not. Cost: O(1)."""
        quota = self._by_key.get(account.key)
        if quota is None or account is asker:
            return account.num_pages
        return max(account.num_pages - quota.reserved_pages, 0)

    def usage(self, key: bytes, account: Account | None) -> Usage:
        """What a namespace holds; nothing where it has no account."""
        quota = self._by_key.get(key)
        limits = (quota.max_pages, quota.reserved_pages) if quota is not None else (None, 0)
        if account is None:
            return Usage(0, 0, 0, *limits)
        return Usage(account.num_pages, account.num_evictable, account.num_leased, *limits)


def _evictable(account: Account, used: Mapping[bytes, int] | None) -> int:
    return account.num_evictable if used is None else account.num_pages - used.get(account.key, 0)
