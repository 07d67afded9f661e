"""Which request used each page last, by content: what a policy may know of pages that the cache holds no more.

    tokens of a request ─▶ one 64-bit hash a page and all before it ─▶ table: hash -> last user

    a path, by the request that used a page last     [ 9 9 9 | 4 4 | - - ]      - : new, or long forgotten

Every use of a page uses all pages above it, so along a path the users only get older, and a path is a few runs. That
also mends what the table has lost: a page whose deeper neighbour is known was used by that one's user, or later.

Hashes decide nothing but what to evict: a collision costs a guess, never a wrong page.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

__all__ = ["PageHistory", "Run", "prefix_hashes"]

Hashes = npt.NDArray[np.uint64]

_WAYS = 4  # places a hash may be at
_MIN_SETS = 2**16
_STEP = np.uint64(0x9E3779B97F4A7C15)
_OTHER = np.uint64(0xBF58476D1CE4E5B9)
_HALF = np.uint64(32)


class Run(NamedTuple):
    """Pages [start, stop) of a path, which request `source` used last."""

    source: int
    start: int
    stop: int


def prefix_hashes(tokens: bytes | bytearray, num_pages: int, page_size: int, namespace: bytes) -> Hashes:
    """[num_pages] hashes, each of a page and all before it. Cost: O(tokens), 2 to 3 ns each."""
    words = np.frombuffer(tokens, np.uint32, num_pages * page_size).astype(np.uint64)
    salt = np.uint64(xxhash.xxh3_64_intdigest(namespace))
    pages = words if page_size == 1 else words.reshape(num_pages, page_size) @ _multipliers(page_size)
    pages += salt
    _mix(pages)
    pages *= _multipliers(num_pages)
    hashes = np.cumsum(pages, dtype=np.uint64)
    _mix(hashes)
    return hashes


def _mix(values: Hashes) -> None:
    """Spread the bits over the word, in place."""
    values ^= values >> _HALF
    values *= _STEP


def _multipliers(count: int) -> Hashes:
    """[count] odd numbers that look random, the same ones every time."""
    size = 1 << max(count - 1, 1023).bit_length()
    return _many_multipliers(size)[:count]


@lru_cache(maxsize=4)
def _many_multipliers(size: int) -> Hashes:
    values = np.arange(1, size + 1, dtype=np.uint64) * _OTHER
    _mix(values)
    return values | np.uint64(1)


class PageHistory:
    """The last user of every page seen lately, in a table of fixed size.

    A hash may stand at four places; a new one takes that of the page used longest ago. A page that was forgotten counts as
    never used again, so the table is much larger than the cache: it must see what comes back too late.

    Args:
        num_pages: pages of the cache; the table has room for at least 16 times as many, and for no less than 262,144.

    Memory: 16 B a place: 4 MiB, or 256 to 512 B a page of the cache, taken as it fills.
    """

    __slots__ = ("_hashes", "_mask", "_users")

    def __init__(self, num_pages: int) -> None:
        num_sets = max(4 << (num_pages - 1).bit_length(), _MIN_SETS)
        self._mask = np.uint64(num_sets - 1)
        self._hashes = np.zeros((num_sets, _WAYS), np.uint64)
        self._users = np.zeros((num_sets, _WAYS), np.int64)  # 0: nobody

    def touch(self, hashes: Hashes, request: int) -> list[Run]:
        """Note that `request`, a number from 1 on, used the pages.

        Cost: a dozen numpy calls on [P, 4], 20 us and 90 ns a page.

        Returns:
            Who used them last, from the first page to the last one known.
        """
        sets = (hashes & self._mask).view(np.int64)
        users = self._users.take(sets, 0)
        same = self._hashes.take(sets, 0) == hashes[:, None]
        ways = np.where(same, -1, users).argmin(1)  # where it stands, or an empty place, or the oldest
        here = np.arange(0, _WAYS * len(sets), _WAYS) + ways
        last = np.where(same.ravel().take(here), users.ravel().take(here), 0)
        places = sets * _WAYS + ways
        self._hashes.put(places, hashes)
        self._users.put(places, request)
        return _runs(np.maximum.accumulate(last[::-1])[::-1])


def _runs(users: npt.NDArray[np.int64]) -> list[Run]:
    """Runs of equal users, the unknown end left out."""
    runs: list[Run] = []
    start, count = 0, len(users)
    changes = (users[1:] != users[:-1]).nonzero()[0].tolist()
    for last in [*changes, count - 1] if count else []:
        source = users.item(start)
        if source == 0:
            break
        runs.append(Run(source, start, last + 1))
        start = last + 1
    return runs
