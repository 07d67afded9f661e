"""The textbook policies. None of them is safe on prefix trees (docs/replay.md has the tables) but they are asked for."""

from __future__ import annotations

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
    """Segmented LRU: leaves used once go before leaves used again, which hold at most `protected` of the pages.

    Args:
        num_pages: pages of the cache.
        protected: share of them that leaves used again may hold before they go first; 0.8 as in the literature.
    """

    __slots__ = ("_limit", "_num_protected", "_probation", "_protected", "_sizes")

    merges = False
    learns = False

    def __init__(self, num_pages: int, protected: float = 0.8) -> None:
        self._limit = int(num_pages * protected)
        self._probation = TickQueue()
        self._protected = TickQueue()
        self._sizes: dict[Node, int] = {}  # pages of each protected leaf, as they were when it came
        self._num_protected = 0

    def add(self, leaf: Node) -> None:
        """Put `leaf` into its segment."""
        if leaf.uses > 1:
            self._protected.add(leaf)
            self._sizes[leaf] = len(leaf.pages)
            self._num_protected += len(leaf.pages)
        else:
            self._probation.add(leaf)

    def discard(self, leaf: Node) -> None:
        """Take `leaf` out, if it is in."""
        num_pages = self._sizes.pop(leaf, None)
        if num_pages is None:
            self._probation.discard(leaf)
        else:
            self._protected.discard(leaf)
            self._num_protected -= num_pages

    def victim(self) -> Node | None:
        """The oldest leaf used once, or the oldest of all where the others hold too much."""
        if self._num_protected > self._limit:
            return self._protected.first()
        return self._probation.first() or self._protected.first()

    def ended(self, request: Ended) -> object:
        """It learns nothing."""
        return None

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def __contains__(self, leaf: Node) -> bool:
        return leaf in self._probation or leaf in self._protected
