"""What is learned from requests: which class a leaf is in, what it is worth, and whether to believe that.

A class is what was seen of a request: its tag, how many of its pages nobody had used before, how soon it followed the
request that it goes on from, and whether a page had been used before it. Numbers are on a log-4 scale. A tag is a feature
like the others: it counts for as much as it has been right.

    a request ended ─▶ PageHistory   who used its pages last
                    ├▶ ReuseStats    those lives ended; its pages begin new ones, in two classes
                    ├▶ LruShadow     what LRU would have found ─▶ Guard: may the classes rule?
                    └▶ Mark          its classes, on the node where it ends
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from radixkv.node import Node
from radixkv.policies.guard import Guard, LruShadow
from radixkv.policies.history import PageHistory, Run, prefix_hashes
from radixkv.policies.policy import Ended
from radixkv.policies.reuse_stats import ReuseStats

__all__ = ["Mark", "ReuseModel"]

_UNKNOWN = -1  # the class of leaves that no request is known to have ended at
_TAGS = 16
_SIZES = 7  # 0, 1 to 3, 4 to 15, ... fresh pages, 1024 and more
_PAUSES = 6  # no request that it goes on from, less than 4 s after it, 16, 64, 256, more
_SOONEST, _LATEST = 64, 512  # requests between two looks at the statistics: when they have grown by an eighth


class Mark(NamedTuple):
    """What is remembered of the request that used a node last.

    Attributes:
        known: its pages that a request had used before it; the others were fresh.
        known_class, fresh_class: of these pages, and of those.
    """

    known: int
    known_class: int
    fresh_class: int


class ReuseModel:
    """Learns from every request; shared by all orders of one cache.

    Deterministic: no chance, and no time but what the requests bring.

    Args:
        num_pages: pages of the cache.

    Cost: 60 us and 130 ns a page for a request, its share of the statistics' refresh included.
    Memory: 256 to 512 B a page of the cache, at least 4 MiB; 2 MiB for the statistics.

    Attributes:
        now_s: when the last request ended, on the cache's clock; -inf before the first.
        version: how often `index` was made; 0 before there is one.
        index: [rows][age buckets] hits a second.
    """

    __slots__ = ("_guard", "_history", "_lru", "_next_look", "_request", "_rows", "_stats", "index", "now_s", "version")

    def __init__(self, num_pages: int) -> None:
        self._history = PageHistory(num_pages)
        self._stats = ReuseStats()
        self._lru = LruShadow(num_pages)
        self._guard = Guard()
        self._request = 0
        self._next_look = _SOONEST
        self._rows: dict[int, int] = {_UNKNOWN: 0}  # class -> row, in order of appearance
        self.now_s = -inf
        self.version = 0
        self.index: list[list[float]] = []

    @property
    def rules(self) -> bool:
        """Whether the index decides; LRU does otherwise."""
        return self.version > 0 and self._guard.trusted

    def row_of(self, leaf: Node) -> int:
        """The row of the class that `leaf`'s last page is in."""
        mark = leaf.mark
        if type(mark) is not Mark:
            return 0
        return self._row(mark.known_class if leaf.end <= mark.known else mark.fresh_class)

    def _row(self, class_: int) -> int:
        """The row of a class; until the next look a new one has the index of those without a class."""
        row = self._rows.get(class_)
        if row is None:
            row = self._rows[class_] = len(self._rows)
            if self.version:
                self.index.append(self.index[0])
        return row

    def learn(self, request: Ended) -> Mark:
        """Take in a request that ended; its mark."""
        number = self._request = self._request + 1
        self.now_s = max(self.now_s, request.time_s)
        hashes = prefix_hashes(request.tokens, request.num_pages, request.page_size, request.namespace)
        runs = self._history.touch(hashes, number)
        known = runs[-1].stop if runs else 0
        mark = self._classify(request, runs, known)
        for source, start, stop in runs:
            self._stats.end(source, start, stop, self.now_s)
        rows = self._row(mark.known_class), self._row(mark.fresh_class)
        self._stats.begin(number, self.now_s, request.num_pages, known, rows)
        num_lru = self._lru.touch(number, runs, request.num_pages)
        self._guard.note(request.num_found, min(num_lru, request.num_sought))
        if number >= self._next_look:
            self._next_look = number + min(max(number // 8, _SOONEST), _LATEST)
            self.index = self._stats.index(len(self._rows), number, self.now_s).tolist()
            self.version += 1
        return mark

    def _classify(self, request: Ended, runs: list[Run], known: int) -> Mark:
        size = min(((request.num_pages - known).bit_length() + 1) // 2, _SIZES - 1)
        pause = 0
        earlier = self._stats.length_and_time(runs[-1].source) if runs else None
        if earlier is not None and earlier[0] == known:  # all of that request, so this one goes on from it
            seconds = int(self.now_s - earlier[1])
            pause = min((max(seconds, 1).bit_length() + 1) // 2, _PAUSES - 1)
        tag = min(max(request.tag, 0), _TAGS - 1)
        class_ = ((tag * _SIZES + size) * _PAUSES + pause) * 2
        return Mark(known, class_, class_ + 1)
