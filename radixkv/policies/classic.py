"""The textbook policies. None of them is safe on prefix trees (docs/replay.md has the tables) but they are asked for."""

from __future__ import annotations

from collections import OrderedDict

from radixkv.node import Node
from radixkv.policies.policy import Ended
from radixkv.policies.queues import KeyQueue, TickQueue

__all__ = ["Fifo", "Lfu", "Lru", "Slru"]


class Lru:
    """Least recently used leaf first. `num_pages`, the capacity, means nothing to it."""

    __slots__ = ("_queue", "add", "discard", "victim")

    merges = True
    learns = False

    def __init__(self, num_pages: int) -> None:
        self._queue = TickQueue()
        self.add = self._queue.add
        self.discard = self._queue.discard
        self.victim = self._queue.first

    def ended(self, request: Ended) -> object:
        """It learns nothing."""
        return None

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, leaf: Node) -> bool:
        return leaf in self._queue


class _Ordered:
    """A policy that is one order by a fixed key."""

    __slots__ = ("_queue", "add", "discard", "victim")

    merges = False
    learns = False

    def __init__(self, queue: KeyQueue) -> None:
        self._queue = queue
        self.add = queue.add
        self.discard = queue.discard
        self.victim = queue.first

    def ended(self, request: Ended) -> object:
        """It learns nothing."""
        return None

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, leaf: Node) -> bool:
        return leaf in self._queue


class Fifo(_Ordered):
    """The leaf whose pages were inserted first, whatever used it since."""

    __slots__ = ()

    def __init__(self, num_pages: int) -> None:
        super().__init__(KeyQueue(lambda leaf: leaf.born))


class Lfu(_Ordered):
    """The leaf that the fewest requests have used since it was inserted; of equals the least recently used."""

    __slots__ = ()

    def __init__(self, num_pages: int) -> None:
        super().__init__(KeyQueue(lambda leaf: (leaf.uses, leaf.tick)))


class Slru:
    """Segmented LRU: what was used once goes first, what was used again falls back to the end of that line by its age.

    Pages used again, those above the leaves among them, hold at most `protected` of the cache: as long as leaves used once
    hold less than the rest, the leaf used again that is oldest joins them, behind all who came before.

    Args:
        num_pages: pages of the cache.
        protected: share of them that may be protected; 0.8 as in the literature.
    """

    __slots__ = ("_num_probation", "_probation", "_protected", "_room")

    merges = False
    learns = False

    def __init__(self, num_pages: int, protected: float = 0.8) -> None:
        self._room = num_pages - int(num_pages * protected)  # pages of leaves on probation, at least
        self._probation: OrderedDict[Node, int] = OrderedDict()  # in the order they came; pages they had then
        self._num_probation = 0
        self._protected = TickQueue()

    def add(self, leaf: Node) -> None:
        """Put `leaf` into its segment."""
        if leaf.uses > 1:
            self._protected.add(leaf)
        else:
            self._put_on_probation(leaf)

    def discard(self, leaf: Node) -> None:
        """Take `leaf` out, if it is in."""
        num_pages = self._probation.pop(leaf, None)
        if num_pages is None:
            self._protected.discard(leaf)
        else:
            self._num_probation -= num_pages

    def victim(self) -> Node | None:
        """The first in line of those on probation, once enough are. Cost: O(1) amortised; a leaf falls back once."""
        while self._num_probation < self._room and (leaf := self._protected.first()) is not None:
            self._protected.discard(leaf)
            self._put_on_probation(leaf)
        return next(iter(self._probation), None) or self._protected.first()

    def ended(self, request: Ended) -> object:
        """It learns nothing."""
        return None

    def _put_on_probation(self, leaf: Node) -> None:
        self._probation[leaf] = len(leaf.pages)
        self._num_probation += len(leaf.pages)

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def __contains__(self, leaf: Node) -> bool:
        return leaf in self._probation or leaf in self._protected
