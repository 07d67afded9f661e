"""Leaves in order, oldest or lowest first: what policies are made of. No call ever looks at all leaves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any, Final

from radixkv.node import Node

__all__ = ["KeyQueue", "TickQueue"]

_FEW: Final = 64  # leaves; no sweep is worth it below


class TickQueue:
    """Leaves ordered by tick, oldest first.

    Nearly every leaf arrives with the newest tick of all, and goes to the end of a linked list in O(1). One that was locked
    for a while and not used (a prompt agreed with a few of its tokens) comes back to the place it had, which is kept. A
    parent whose last child was evicted, or the cold half of a split, comes with an old tick and no place: those few go to
    a `KeyQueue`, and the oldest leaf is the older of the two heads.

        recent   9 · 12 · (14) · 15        (14) is away: its place is kept until it surfaces, or most places are of such
        late     7 · 13                    the oldest is 7

    Cost: add and discard O(1) amortised, O(log n) for a leaf with an old tick and no place; first O(1) amortised.
    """

    __slots__ = ("_away", "_late", "_newest", "_recent")

    def __init__(self) -> None:
        self._recent: OrderedDict[Node, int] = OrderedDict()  # leaf -> the tick it came with
        self._away: set[Node] = set()  # those in `_recent` that were discarded
        self._newest = 0  # tick of the last leaf that went to `_recent`
        self._late = KeyQueue(_by_tick)

    def add(self, leaf: Node) -> None:
        """Put `leaf` in by its tick."""
        tick = leaf.tick
        if leaf in self._away:
            self._away.remove(leaf)
            if self._recent[leaf] == tick:
                return
            del self._recent[leaf]
        if tick >= self._newest:
            self._recent[leaf] = self._newest = tick
        else:
            self._late.add(leaf)

    def discard(self, leaf: Node) -> None:
        """Take `leaf` out, if it is in."""
        if leaf not in self._recent:
            self._late.discard(leaf)
            return
        self._away.add(leaf)
        if len(self._away) > _FEW and len(self._away) * 2 > len(self._recent):
            for gone in self._away:
                del self._recent[gone]
            self._away.clear()

    def first(self) -> Node | None:
        """The leaf with the oldest tick, or None."""
        late = self._late.first() if self._late else None
        while self._recent:
            leaf = next(iter(self._recent))
            if leaf not in self._away:
                return leaf if late is None or late.tick > leaf.tick else late
            del self._recent[leaf]
            self._away.remove(leaf)
        return late

    def __len__(self) -> int:
        return len(self._recent) - len(self._away) + len(self._late)

    def __contains__(self, leaf: Node) -> bool:
        return (leaf in self._recent and leaf not in self._away) or leaf in self._late


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
        if self._live.pop(leaf, None) is not None and len(self._heap) > _FEW and len(self._live) * 4 < len(self._heap):
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
