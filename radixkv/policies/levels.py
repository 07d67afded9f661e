"""Eviction by level: the lowest first, and inside a level whatever policy there is.

    shared   │ level 0 ─▶ policy   level 35 ─▶ base policy   level 80 ─▶ policy
    tenant b │                     level 35 ─▶ policy                              a group: a namespace with a quota

The leaves of namespaces with a quota or a reservation are ordered by themselves, so that a victim of theirs is found
without looking at anybody else's. Whose turn it is among the groups is decided by their first leaves: the lower level,
then the older tick. A leaf whose level falls with time waits in a queue by the moment of its next fall; what is due is
put into its new level before a victim is named. No call looks at all leaves, or at all groups.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import partial
from heapq import heapify, heappop, heappush
from math import inf
from typing import Final, NamedTuple, final

from radixkv.node import Account, Node
from radixkv.policies.classic import Lru
from radixkv.policies.policy import Ended, Policy
from radixkv.policies.queues import KeyQueue
from radixkv.retention import DEFAULT_PRIORITY

__all__ = ["Levels", "priority"]

_NO_LEVEL: Final = 101  # above all of them


@final
class _Group:
    """Leaves of one namespace, or of all without a quota: an order for each level that has some."""

    __slots__ = ("_default", "_make", "_open", "_parts", "reserved_pages", "serial")

    def __init__(self, default: Policy, make: Callable[[], Policy]) -> None:
        self._default = default  # of the level that nearly all leaves have; it stays when it is empty
        self._make = make
        self._parts: dict[int, Policy] = {DEFAULT_PRIORITY: default}
        self._open: list[int] = []  # levels that may hold a leaf, ascending
        self.reserved_pages = 0  # of its tree, that nobody else may evict
        self.serial = 0  # of its entry among the heads

    def at(self, level: int) -> Policy:
        """The order of a level. Cost: O(log levels), O(levels) for one that was empty; there are at most 101."""
        index = bisect_left(self._open, level)
        if index == len(self._open) or self._open[index] != level:
            self._open.insert(index, level)
            if level not in self._parts:
                self._parts[level] = self._make()
        return self._parts[level]

    def level(self) -> int:
        """The lowest level with a leaf, `_NO_LEVEL` where there is none. Cost: O(1) amortised, and the policy's."""
        while self._open:
            part = self._parts[self._open[0]]
            if len(part):
                return self._open[0]
            level = self._open.pop(0)
            if part is not self._default:
                del self._parts[level]
        return _NO_LEVEL

    def first(self) -> Node | None:
        """The leaf to go first, or None where there is none."""
        level = self.level()
        return self._parts[level].victim() if level < _NO_LEVEL else None

    def holds(self, level: int, part: Policy) -> bool:
        """Whether `part` is the order of that level."""
        return self._parts.get(level) is part

    def num_leaves(self) -> int:
        """Leaves of all levels."""
        return sum(len(part) for part in self._parts.values())


class _Head(NamedTuple):
    """The first leaf of a group, as it was when the heap got it; `serial` tells whether the group has a newer one."""

    level: int
    tick: int
    serial: int
    group: _Group


@final
class Levels:
    """A policy for each level and group, as one policy.

    Args:
        base: the policy to use; what it holds stays in it, as leaves of the shared group without a retention.
        fresh: makes another of its kind, for the other levels and groups.
        clock: seconds, as the leaves' `time_s`.

    Attributes:
        num_falls: leaves that have fallen a level, or several, because their time was over.

    Cost: add and discard O(1) above the policy's, O(log n) for a leaf with a time; victim O(log groups) for each group
    whose leaves have changed since the last one, and for each that may give nothing.
    """

    __slots__ = (
        "_changed",
        "_clock",
        "_due",
        "_due_s",
        "_groups",
        "_heads",
        "_make",
        "_now_s",
        "_places",
        "_serial",
        "_shared",
        "base",
        "learns",
        "merges",
        "num_falls",
    )

    def __init__(self, base: Policy, fresh: Callable[[], Policy], clock: Callable[[], float]) -> None:
        self.base = base
        self.merges = base.merges
        self.learns = base.learns
        self._make = _maker(base, fresh)
        self._clock = clock
        self._shared = _Group(base, self._make)
        self._shared.at(DEFAULT_PRIORITY)
        self._groups: dict[bytes, _Group] = {}
        self._places: dict[Node, Policy] = {}  # where a leaf is; those that are not here are in `base`
        self._due_s: dict[Node, float] = {}  # leaf -> when its level falls next
        self._due = KeyQueue(self._due_s.__getitem__)
        self._heads: list[_Head] = []  # of every group, the stale ones too; used while there are groups
        self._changed: dict[_Group, None] = {}  # groups whose first leaf may be another, in order of change
        self._serial = 0
        self._now_s = -inf  # the latest time seen: levels never rise because a clock was set back
        self.num_falls = 0

    def set_clock(self, clock: Callable[[], float]) -> None:
        """Take the time from `clock`; before any leaf has come."""
        self._clock = clock

    # -- the order ----------------------------------------------------------------------------------------------------

    def add(self, leaf: Node) -> None:
        """Put `leaf` into the order of its group and level."""
        level = DEFAULT_PRIORITY
        if leaf.retain is not None:
            standing = leaf.retain.standing(leaf.time_s, self._now())
            level = standing.level
            if standing.due_s < inf:
                self._due_s[leaf] = standing.due_s
                self._due.add(leaf)
        group = self._group(leaf)
        part = group.at(level)
        if part is not self.base:
            self._places[leaf] = part
        part.add(leaf)
        if self._groups:
            self._changed[group] = None

    def discard(self, leaf: Node) -> None:
        """Take `leaf` out, if it is in."""
        self._places.pop(leaf, self.base).discard(leaf)
        if self._due_s.pop(leaf, None) is not None:
            self._due.discard(leaf)
        if self._groups:
            self._changed[self._group(leaf)] = None

    def victim(self) -> Node | None:
        """The leaf to go first when nobody's pages are spared."""
        self._fall()
        if not self._groups:
            return self._shared.first()
        head = self._head()
        return head.group.first() if head is not None else None

    def victim_for(self, asker: Account | None) -> Node | None:
        """The leaf to go first for a request of `asker` (None: nobody's): never one of another's reserved pages."""
        if not self._groups:
            return self.victim()
        self._fall()
        spared: list[_Head] = []
        found: Node | None = None
        while found is None:
            head = self._head()
            if head is None:
                break
            leaf = head.group.first()
            assert leaf is not None, head.group
            if leaf.account is asker or leaf.account.num_pages > head.group.reserved_pages:
                found = leaf
            else:
                spared.append(heappop(self._heads))
        for head in spared:
            heappush(self._heads, head)
        return found

    def victim_of(self, namespace: bytes) -> Node | None:
        """The leaf to go first among those of a namespace that is a group."""
        self._fall()
        return self._groups[namespace].first()

    def ended(self, request: Ended) -> object:
        """What the policy notes of a request."""
        return self.base.ended(request)

    def __len__(self) -> int:
        return sum(group.num_leaves() for group in (self._shared, *self._groups.values()))

    def __contains__(self, leaf: Node) -> bool:
        return leaf in self._places.get(leaf, self.base)

    # -- groups -------------------------------------------------------------------------------------------------------

    def set_group(self, namespace: bytes, reserved_pages: int, leaves: Iterable[Node]) -> None:
        """Order the leaves of a namespace, all of which are given, by themselves; spare some of its pages from others.

        Cost: O(n log n) of its leaves where it was no group yet, O(1) else.
        """
        group = self._groups.get(namespace)
        if group is None:
            self._changed[self._shared] = None
            group = _Group(self._make(), self._make)
            self._move(namespace, group, leaves)
        group.reserved_pages = reserved_pages

    def drop_group(self, namespace: bytes, leaves: Iterable[Node]) -> None:
        """Put the leaves of a namespace, all of which are given, among those of all the others."""
        self._move(namespace, None, leaves)

    def _move(self, namespace: bytes, group: _Group | None, leaves: Iterable[Node]) -> None:
        moved = sorted(leaves, key=_tick)
        for leaf in moved:
            self.discard(leaf)
        if group is not None:
            self._groups[namespace] = group
        else:
            old = self._groups.pop(namespace)
            self._changed.pop(old, None)
            old.serial = 0
        for leaf in moved:
            self.add(leaf)

    def _group(self, leaf: Node) -> _Group:
        return self._groups.get(leaf.account.key, self._shared) if self._groups else self._shared

    def _head(self) -> _Head | None:
        """The head of the group whose turn it is, still in the heap."""
        for group in self._changed:
            leaf = group.first()
            group.serial = 0
            if leaf is not None:
                self._serial += 1
                group.serial = self._serial
                heappush(self._heads, _Head(group.level(), leaf.tick, self._serial, group))
        self._changed.clear()
        if len(self._heads) > 4 * len(self._groups) + 64:
            self._heads = [head for head in self._heads if head.group.serial == head.serial]
            heapify(self._heads)
        heads = self._heads
        while heads and heads[0].group.serial != heads[0].serial:
            heappop(heads)
        return heads[0] if heads else None

    # -- time ---------------------------------------------------------------------------------------------------------

    def _fall(self) -> None:
        """Put every leaf whose level has changed by now where it belongs. Cost: O(log n) for each."""
        if not self._due_s:
            return
        now_s = self._now()
        while (leaf := self._due.first()) is not None and self._due_s[leaf] <= now_s:
            self.discard(leaf)
            self.add(leaf)
            self.num_falls += 1

    def _now(self) -> float:
        self._now_s = max(self._now_s, self._clock())
        return self._now_s

    # -- checks -------------------------------------------------------------------------------------------------------

    def misplaced(self, leaf: Node) -> bool:
        """Whether `leaf`, which is in the order, is not where its namespace and its retention say; for checks."""
        now_s = self._now()
        if self._due_s.get(leaf, inf) <= now_s:
            return False  # the next victim's turn will move it
        level = leaf.retain.standing(leaf.time_s, now_s).level if leaf.retain is not None else DEFAULT_PRIORITY
        return not self._group(leaf).holds(level, self._places.get(leaf, self.base))

    def num_forgotten(self) -> int:
        """Groups that have leaves and whose turn would never come; for checks."""
        if not self._groups:
            return 0
        known = {head.group for head in self._heads if head.group.serial == head.serial} | set(self._changed)
        return sum(group.num_leaves() > 0 and group not in known for group in (self._shared, *self._groups.values()))


def priority(num_pages: int) -> Levels:
    """LRU inside the levels of retention: the policy `priority`. `num_pages`, the capacity, means nothing to it."""
    return Levels(Lru(num_pages), partial(Lru, num_pages), _no_time)


def _maker(base: Policy, fresh: Callable[[], Policy]) -> Callable[[], Policy]:
    """What makes the order of another level: the policy's sibling, or else another of its kind.

    Nothing would ever be told to another that learns, so where it offers no sibling the other levels are LRU.
    """
    sibling: Callable[[], Policy] | None = getattr(base, "sibling", None)
    if sibling is not None:
        return sibling
    return partial(Lru, 0) if base.learns else fresh


def _tick(leaf: Node) -> int:
    return leaf.tick


def _no_time() -> float:
    return 0.0
