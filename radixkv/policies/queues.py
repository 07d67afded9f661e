"""Leaves in order, oldest or lowest first: what policies are made of. No call ever looks at all leaves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any

from radixkv.node import Node

__all__ = ["KeyQueue", "TickQueue"]


class TickQueue:
    """Leaves ordered by tick, oldest first.

    Nearly every leaf arrives with the newest tick of all, and goes to the end of a linked list in O(1). A parent whose
    last child was evicted, or the cold half of a split, comes back with an old tick: those few go to a `KeyQueue`, and
    the oldest leaf is the older of the two heads.

    Cost: add and discard O(1), O(log n) for a leaf with an old tick; first O(1) amortised.
    """

    __slots__ = ("_late", "_newest", "_recent")

    def __init__(self) -> None:
        self._recent: OrderedDict[Node, int] = OrderedDict()
        self._newest = 0  # tick of the last leaf that went to `_recent`
        self._late = KeyQueue(_by_tick)

    def add(self, leaf: Node) -> None:
        """Put `leaf` in by its tick."""
        tick = leaf.tick
        if tick >= self._newest:
            self._recent[leaf] = self._newest = tick
        else:
            self._late.add(leaf)

    def discard(self, leaf: Node) -> None:
        """Take `leaf` out, if it is in."""
        if self._recent.pop(leaf, None) is None:
            self._late.discard(leaf)

    def first(self) -> Node | None:
        """The leaf with the oldest tick, or None."""
        late = self._late.first()
        if not self._recent:
            return late
        leaf, tick = next(iter(self._recent.items()))
        return leaf if late is None or late.tick > tick else late

    def __len__(self) -> int:
        return len(self._recent) + len(self._late)

    def __contains__(self, leaf: Node) -> bool:
        return leaf in self._recent or leaf in self._late


class KeyQueue:
    """Leaves ordered by a key, lowest first; of equal keys the one that came first.

    A heap whose entries of leaves that left are dropped when they surface, and cleared in one sweep once they are most of
    it. A leaf's key must not change while it is in.

    Args:
        key: what to order a leaf by.

    Cost: add O(log n); discard and first O(1) amortised.
    """

    __slots__ = ("_heap", "_key", "_live", "_serial")

    def __init__(self, key: Callable[[Node], Any]) -> None:
        self._key = key
        self._live: dict[Node, int] = {}  # leaf -> serial of its heap entry
        self._heap: list[tuple[Any, int, Node]] = []
        self._serial = 0

    def add(self, leaf: Node) -> None:
        """Put `leaf` in by its key."""
        self._serial += 1
        self._live[leaf] = self._serial
        heappush(self._heap, (self._key(leaf), self._serial, leaf))

    def discard(self, leaf: Node) -> None:
        """Take `leaf` out, if it is in."""
        if self._live.pop(leaf, None) is not None and len(self._heap) > 64 and len(self._live) * 4 < len(self._heap):
            self._heap = [entry for entry in self._heap if self._live.get(entry[2]) == entry[1]]
            heapify(self._heap)

    def first(self) -> Node | None:
        """The leaf with the lowest key, or None."""
        heap, live = self._heap, self._live
        while heap and live.get(heap[0][2]) != heap[0][1]:
            heappop(heap)
        return heap[0][2] if heap else None

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, leaf: Node) -> bool:
        return leaf in self._live


def _by_tick(leaf: Node) -> int:
    return leaf.tick
