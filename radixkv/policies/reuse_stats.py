"""How likely pages are to be used again, by class and age: survival analysis of page lives.

A page's life begins when a request uses it and ends when another does. Most lives are still going on when one looks, so
plain averages would lie; what is counted instead is, by class and age, how many lives were watched through an age bucket,
and how many ended in it:

    age      0 s   1 s   1.5 s  2.3 s   3.4 s ...  16 h          rate = ended / watched, a life that is in the bucket now
    watched  900 | 870 | 861.4 | 850.0 | ...                     counts for the part of it that it has lived
    ended     30 |   9 |  10   |   4   | ...

A class with few lives is drawn towards what all of them do: a bucket of all classes towards the bucket before, a class's
sum towards the others', its buckets towards its sum. Pseudo-counts are in mean requests, the same at any page size.

The index of a class at an age is the most hits that a page brings for each second it is kept, over all times one might give
up on it: the Gittins index. The page with the lowest is the one to lose.

Sources: E. L. Kaplan and P. Meier, JASA 53, 1958; J. C. Gittins, JRSS B 41, 1979.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

__all__ = ["BUCKET_ENDS", "NUM_BUCKETS", "ReuseStats", "age_bucket", "index_of", "reuse_rates"]

NUM_BUCKETS = 28
"""Ages: [0, 1) s, then each bucket 1.5 times as long as the one before; the last is open."""

Table = npt.NDArray[np.float64]

_RATIO = 1.5
_EDGES = np.concatenate([[0.0], _RATIO ** np.arange(NUM_BUCKETS)])
_WIDTHS = np.diff(_EDGES)
_FIRST_RATE = 0.02  # of the very first bucket, before anything is known
_PRIOR = 3.0  # pseudo-counts, in mean requests


BUCKET_ENDS = [*_EDGES[1:-1].tolist(), float("inf")]
"""The age at which each bucket ends, seconds."""


def age_bucket(age_s: float) -> int:
    """The bucket of an age."""
    return bisect_right(BUCKET_ENDS, age_s)


class ReuseStats:
    """The lives of the last `window` requests' pages, by class.

    Classes are small integers, `row`s, given by the caller in order of appearance. A request has pages of two: those some
    request used before, its first `known` ones, and its fresh ones.

    Args:
        window: requests to remember, a power of two.

    Memory: about 120 B a request of the window.
    """

    __slots__ = (
        "_ended_age_s",
        "_ended_count",
        "_ended_request",
        "_ended_row",
        "_known",
        "_left",
        "_length",
        "_mask",
        "_num_ended",
        "_request",
        "_rows",
        "_time_s",
        "window",
    )

    def __init__(self, window: int = 2**14) -> None:
        self.window = window
        self._mask = window - 1
        # lives, by request modulo the window
        self._request = np.full(window, -1, np.int64)
        self._time_s = np.zeros(window)
        self._length = np.zeros(window, np.int32)
        self._known = np.zeros(window, np.int32)
        self._rows = np.zeros(2 * window, np.int32)  # of the known pages, of the fresh ones, of the next request ...
        self._left = np.zeros(2 * window, np.int32)  # pages whose life goes on
        # lives that ended, the last ones
        self._num_ended = 0
        self._ended_request = np.full(2 * window, -1, np.int64)
        self._ended_row = np.zeros(2 * window, np.int32)
        self._ended_count = np.zeros(2 * window, np.int32)
        self._ended_age_s = np.zeros(2 * window)

    def length_and_time(self, request: int) -> tuple[int, float] | None:
        """How many pages `request` had, and when it was; None where it is forgotten."""
        place = request & self._mask
        if self._request.item(place) != request:
            return None
        return self._length.item(place), self._time_s.item(place)

    def begin(self, request: int, time_s: float, length: int, known: int, rows: tuple[int, int]) -> None:
        """The pages of `request` begin a life: `known` of class rows[0], the others of class rows[1]. Cost: O(1)."""
        place = request & self._mask
        self._request[place] = request
        self._time_s[place] = time_s
        self._length[place] = length
        self._known[place] = known
        self._rows[2 * place], self._rows[2 * place + 1] = rows
        self._left[2 * place], self._left[2 * place + 1] = known, length - known

    def end(self, request: int, start: int, stop: int, time_s: float) -> None:
        """The lives of pages [start, stop) of `request` end: they were used again. Cost: O(1)."""
        place = request & self._mask
        if self._request.item(place) != request:
            return
        known, age_s = self._known.item(place), time_s - self._time_s.item(place)
        for part, count in ((2 * place, min(stop, known) - start), (2 * place + 1, stop - max(start, known))):
            if count > 0:
                self._left[part] -= count
                last = self._num_ended % len(self._ended_row)
                self._ended_request[last] = request
                self._ended_row[last] = self._rows[part]
                self._ended_count[last] = count
                self._ended_age_s[last] = age_s
                self._num_ended += 1

    def index(self, num_rows: int, request: int, time_s: float) -> Table:
        """[num_rows, NUM_BUCKETS] hits a second, by class and age. Cost: O(window + rows x buckets^2), 1 to 4 ms."""
        over = np.flatnonzero(self._ended_request > request - self.window)
        open_ = np.flatnonzero(self._left)
        rows = np.concatenate([self._ended_row[over], self._rows[open_]]).astype(np.int64)
        ages = np.concatenate([self._ended_age_s[over], time_s - self._time_s[open_ // 2]])
        counts = np.concatenate([self._ended_count[over], self._left[open_]]).astype(np.float64)
        mean_pages = max(float(self._length.sum()) / max(int(np.count_nonzero(self._request >= 0)), 1), 1.0)
        cells, lived = _cells_and_parts(rows, ages)
        size, shape = num_rows * NUM_BUCKETS, (num_rows, NUM_BUCKETS)
        ends = np.bincount(cells[: len(over)], counts[: len(over)], size).astype(np.float64).reshape(shape)
        here = np.bincount(cells, counts, size).astype(np.float64).reshape(shape)
        part = np.bincount(cells, counts * lived, size).astype(np.float64).reshape(shape)
        watched: Table = np.cumsum(here[:, ::-1], axis=1)[:, ::-1] - here + part
        return index_of(reuse_rates(ends, watched, _PRIOR * mean_pages))


def _cells_and_parts(rows: npt.NDArray[np.int64], ages: Table) -> tuple[npt.NDArray[np.int64], Table]:
    """The cell (class, bucket) of each life, flat, and which part of the bucket it has lived, on a log scale."""
    buckets = np.searchsorted(_EDGES[1:-1], ages, side="right")
    logs = np.log(np.maximum(ages, 1.0)) / np.log(_RATIO) + 1 - buckets
    parts = np.where(buckets == 0, ages, np.where(buckets == NUM_BUCKETS - 1, 1.0, logs))
    return rows * NUM_BUCKETS + buckets, np.clip(parts, 0.0, 1.0)


def reuse_rates(ended: Table, watched: Table, prior: float) -> Table:
    """[rows, NUM_BUCKETS] lives that end in a bucket for each one watched through it.

    Args:
        ended, watched: [rows, NUM_BUCKETS] counts.
        prior: pseudo-counts.
    """
    pooled = np.empty(NUM_BUCKETS)
    rate = _FIRST_RATE
    for bucket, (ends, lives) in enumerate(zip(ended.sum(0).tolist(), watched.sum(0).tolist(), strict=True)):
        pooled[bucket] = rate = (ends + prior * rate) / (lives + prior)
    expected = watched * pooled
    factor = (ended.sum(1, keepdims=True) + prior) / (expected.sum(1, keepdims=True) + prior)
    rates: Table = pooled * factor * ((ended + prior) / (expected * factor + prior))
    return rates


def index_of(rates: Table) -> Table:
    """[rows, NUM_BUCKETS] the Gittins index: hits a second over the best time to give up, from each age on."""
    rows = len(rates)
    alive = np.ones((rows, NUM_BUCKETS + 1))
    np.cumprod(np.exp(-rates), axis=1, out=alive[:, 1:])
    kept_s = np.zeros((rows, NUM_BUCKETS + 1))
    np.cumsum(_WIDTHS * (alive[:, 1:] + alive[:, :-1]) / 2, axis=1, out=kept_s[:, 1:])
    best = np.empty((rows, NUM_BUCKETS))
    for age in range(NUM_BUCKETS):
        hits = alive[:, age, None] - alive[:, age + 1 :]
        seconds = kept_s[:, age + 1 :] - kept_s[:, age, None]
        best[:, age] = (hits / np.maximum(seconds, 1e-300)).max(1)
    return best
