"""Eviction order over the leaves that may be evicted.

The tree tells a policy which leaves are evictable (unlocked, no children) as they come and go; the policy says which
one loses its last pages next. A policy never sees tensors, tokens or time: recency is an integer tick.

    tree ── add(leaf), discard(leaf) ──▶ policy ── victim() ──▶ cache trims the leaf's end
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Protocol

from radixkv.node import Node

__all__ = ["POLICIES", "Lru", "Policy", "TickQueue"]


class Policy(Protocol):
    """What the cache asks of an eviction policy."""

    def add(self, leaf: Node) -> None:
        """`leaf` became evictable; `leaf.tick` says when it was last used."""

    def discard(self, leaf: Node) -> None:
        """`leaf` is evictable no more: locked, grown a child, or gone."""

    def victim(self) -> Node | None:
        """The leaf to lose pages next, still in the order; None when there is none."""

    def __len__(self) -> int:
        """Evictable leaves."""

    def __contains__(self, leaf: Node) -> bool:
        """Whether `leaf` is in the order; for checks."""


class TickQueue:
    """Leaves ordered by tick, oldest first.

    Nearly every leaf arrives with the newest tick of all, and goes to the end of a linked list in O(1). A parent whose
    last child was evicted, or the cold half of a split, comes back with an old tick: those few go to a heap, and
    the oldest leaf is the older of the two heads. Heap entries of leaves that left are dropped when they surface,
    and cleared in one sweep once they are most of the heap, which is O(1) amortised.

    Cost: add and discard O(1), O(log n) for a leaf with an old tick; first O(1) amortised. No scan over all leaves.
    """

    __slots__ = ("_heap", "_late", "_recent", "_serial")

    def __init__(self) -> None:
        self._recent: OrderedDict[Node, int] = OrderedDict()
        self._late: dict[Node, int] = {}  # leaf -> serial of its live heap entry
        self._heap: list[tuple[int, int, Node]] = []
        self._serial = 0

    def add(self, leaf: Node) -> None:
        """Put `leaf` in by its tick."""
        recent = self._recent
        if not recent or leaf.tick >= next(reversed(recent.values())):
            recent[leaf] = leaf.tick
            return
        self._serial += 1
        self._late[leaf] = self._serial
        heappush(self._heap, (leaf.tick, self._serial, leaf))

    def discard(self, leaf: Node) -> None:
        """Take `leaf` out, if it is in."""
        was_late = self._recent.pop(leaf, None) is None and self._late.pop(leaf, None) is not None
        if was_late and len(self._heap) > 64 and len(self._late) * 4 < len(self._heap):
            self._heap = [entry for entry in self._heap if self._late.get(entry[2]) == entry[1]]
            heapify(self._heap)

    def first(self) -> Node | None:
        """The leaf with the oldest tick, or None."""
        heap, late = self._heap, self._late
        while heap and late.get(heap[0][2]) != heap[0][1]:
            heappop(heap)
        if not self._recent:
            return heap[0][2] if heap else None
        leaf, tick = next(iter(self._recent.items()))
        return heap[0][2] if heap and heap[0][0] <= tick else leaf

    def __len__(self) -> int:
        return len(self._recent) + len(self._late)

    def __contains__(self, leaf: Node) -> bool:
        return leaf in self._recent or leaf in self._late


class Lru:
    """Least recently used leaf first."""

    __slots__ = ("_queue", "add", "discard", "victim")

    def __init__(self) -> None:
        self._queue = TickQueue()
        self.add = self._queue.add
        self.discard = self._queue.discard
        self.victim = self._queue.first

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, leaf: Node) -> bool:
        return leaf in self._queue


POLICIES: dict[str, Callable[[], Policy]] = {"lru": Lru}
"""Every eviction policy by its name."""
