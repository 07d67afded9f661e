"""`auto`: evict what is least likely to be used soon, as learned from what was; never much worse than LRU.

    class  leaves, oldest first      index of the oldest, hits a second
    a      [ 12 30 31 ... ]          0.004
    b      [ 70 71 ]                 0.001     ◀─ victim: leaf 70, though 12 is older
    c      [ 55 80 ... ]             0.02

In a class the oldest leaf has the lowest index, nearly always: it is the only one looked at.
"""

from __future__ import annotations

import numpy as np

from radixkv.node import Node
from radixkv.policies.policy import Ended
from radixkv.policies.queues import TickQueue
from radixkv.policies.reuse_model import Mark, ReuseModel
from radixkv.policies.reuse_stats import BUCKET_ENDS, age_bucket

__all__ = ["Hazard"]

_NEVER = np.iinfo(np.int64).max


class Hazard:
    """Learned eviction over classes of leaves, guarded by LRU.

    Args:
        num_pages: pages of the cache.
        model: what was learned so far; a new one by default.

    Cost: the model's for a request; for a victim 20 us, whatever the number of leaves.
    """

    __slots__ = (
        "_changed",
        "_heads",
        "_looked_s",
        "_model",
        "_queues",
        "_rows",
        "_ticks",
        "_until_s",
        "_values",
        "_version",
        "_victim",
    )

    merges = False
    learns = True

    def __init__(self, num_pages: int, model: ReuseModel | None = None) -> None:
        self._model = model or ReuseModel(num_pages)
        self._rows: dict[Node, int] = {}  # leaf -> row of the queue it is in
        self._queues: list[TickQueue] = []  # this and the next four: by row
        self._heads: list[Node | None] = []
        self._ticks = np.empty(0, np.int64)  # of the heads
        self._values = np.empty(0)  # their indices
        self._until_s = np.empty(0)  # when these change
        self._changed: set[int] = set()  # rows whose head may be another
        self._victim: Node | None = None  # the last one named
        self._version = 0  # of the model's index that `_values` are from
        self._looked_s = -np.inf
        self._open(0)

    def sibling(self) -> Hazard:
        """An empty order by what this one learns; only one of them is told of requests."""
        return Hazard(0, self._model)

    def ended(self, request: Ended) -> Mark:
        """Learn from a request; its mark."""
        return self._model.learn(request)

    def add(self, leaf: Node) -> None:
        """Put `leaf` into its class's queue. Cost: O(1), O(log n) for a leaf with an old tick."""
        row = self._rows[leaf] = self._model.row_of(leaf)
        if row >= len(self._queues):
            self._open(row)
        self._queues[row].add(leaf)
        self._changed.add(row)

    def discard(self, leaf: Node) -> None:
        """Take `leaf` out, if it is in. Cost: O(1)."""
        row = self._rows.pop(leaf, None)
        if row is not None:
            self._queues[row].discard(leaf)
            self._changed.add(row)

    def victim(self) -> Node | None:
        """The head with the lowest index, or the oldest one where the classes may not rule; of equals the oldest.

        Cost: O(1) for each class whose head changed or aged, and two or three numpy calls on [classes].
        """
        last = self._victim
        if last is not None and last in self._rows and self._rows[last] != self._model.row_of(last):
            self.discard(last)  # it was trimmed down to pages of another class
            self.add(last)
        self._look_again()
        if self._model.rules:
            row = self._values.argmin()
            equal = self._values == self._values[row]
            if np.count_nonzero(equal) > 1:
                row = np.where(equal, self._ticks, _NEVER).argmin()
        else:
            row = self._ticks.argmin()
        self._victim = self._heads[row]
        return self._victim

    def _look_again(self) -> None:
        """Find the heads that changed, and the indices of those and of heads that have come into another age bucket."""
        model, now_s = self._model, self._model.now_s
        if self._version != model.version:
            self._version = model.version
            self._changed.update(range(len(self._queues)))
        if self._looked_s != now_s:
            self._looked_s = now_s
            self._changed.update((self._until_s <= now_s).nonzero()[0].tolist())
        for row in self._changed:
            head = self._heads[row] = self._queues[row].first()
            if head is None:
                self._ticks[row], self._values[row], self._until_s[row] = _NEVER, np.inf, np.inf
                continue
            self._ticks[row] = head.tick
            if model.version:
                bucket = age_bucket(now_s - head.time_s)
                self._values[row] = model.index[row][bucket]
                self._until_s[row] = head.time_s + BUCKET_ENDS[bucket]
        self._changed.clear()

    def _open(self, row: int) -> None:
        """Make queues up to `row`."""
        missing = row + 1 - len(self._queues)
        self._queues += [TickQueue() for _ in range(missing)]
        self._heads += [None] * missing
        self._ticks = np.append(self._ticks, np.full(missing, _NEVER))
        self._values = np.append(self._values, np.full(missing, np.inf))
        self._until_s = np.append(self._until_s, np.full(missing, np.inf))

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, leaf: Node) -> bool:
        return leaf in self._rows
