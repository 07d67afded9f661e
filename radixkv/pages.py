"""The page pool: which pages are free.

    page id      0 ... num_pages - 1
    turns        how often a page was given out or came back: even while it is free, odd while it is in use
    generation   how often it came back: turns // 2

The pool holds no tensors: a page id says where in a page store the KV of `page_size` tokens lies. A page's generation
tells a reader that a page it looked up has since been given to someone else, and its turns catch a page freed twice. Who
uses a page is written nowhere but where it is used: in the tree's nodes and in the leases (docs/design/0008-native.md
says what an owner for every page cost).
"""

from __future__ import annotations

from array import array
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from radixkv.errors import ConfigError, InvariantError, PageError
from radixkv.tokens import as_count

__all__ = ["PagePool"]

_LOOP_LIMIT: Final = 48  # below this a Python loop beats numpy's call overhead


class PagePool:
    """A free list of page ids, and how often each page was given out and came back.

    Args:
        num_pages: pages in all, >= 1.

    >>> pool = PagePool(4)
    >>> pages = pool.allocate(2)
    >>> pool.num_free, pool.is_free(pages[0])
    (2, False)
    >>> pool.free(pages); pool.num_free
    4
    """

    __slots__ = ("_free", "_turns", "num_pages")

    def __init__(self, num_pages: int) -> None:
        num_pages = as_count("num_pages", num_pages)
        if num_pages < 1:
            raise ConfigError("num_pages", num_pages, "at least 1")
        self.num_pages = num_pages
        self._free = array("i", range(num_pages - 1, -1, -1))  # a stack; low ids are given out first
        self._turns = array("q", bytes(8 * num_pages))

    @property
    def num_free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    def is_free(self, page: int) -> bool:
        """Whether nobody uses `page`."""
        return self._turns[page] % 2 == 0

    def generation(self, page: int) -> int:
        """How many times `page` was freed."""
        return self._turns[page] // 2

    def generations(self, pages: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """[n] generations of [n] pages; a copy."""
        return np.frombuffer(self._turns, np.int64)[np.asarray(pages, np.int64)] // 2

    def allocate(self, num_pages: int) -> array[int]:
        """Take `num_pages` free pages.

        Cost: O(num_pages). The caller makes sure that so many are free.
        """
        free = self._free
        cut = len(free) - num_pages
        assert 0 <= cut <= len(free), (num_pages, len(free))
        pages = free[cut:]
        pages.reverse()
        del free[cut:]
        self._step(pages)
        return pages

    def free(self, pages: array[int]) -> None:
        """Give back pages that are in use.

        Cost: O(len(pages)).

        Raises:
            PageError: a page is not in use (freed twice, say), or there is no such page; nothing is freed then.
        """
        self._require_used(pages)
        self._step(pages)
        self._free.extend(pages[::-1])

    def free_pages(self) -> list[int]:
        """Every free page, ascending; O(num_pages), for checks and reports."""
        pages: list[int] = np.flatnonzero(np.frombuffer(self._turns, np.int64) % 2 == 0).tolist()
        return pages

    def check(self) -> None:
        """Recount everything.

        Raises:
            InvariantError: I1, a page is free and in use, or neither.
        """
        free = self._free.tolist()
        if len(set(free)) != len(free):
            raise InvariantError("I1", reason="a page is on the free list twice", free=len(free))
        if sorted(free) != self.free_pages():
            raise InvariantError("I1", reason="free list and turns differ", free=len(free))

    def _step(self, pages: array[int]) -> None:
        """Move the turns of distinct pages on by one."""
        if len(pages) > _LOOP_LIMIT:
            np.frombuffer(self._turns, np.int64)[np.asarray(pages)] += 1
            return
        turns = self._turns
        for page in pages:
            turns[page] += 1

    def _require_used(self, pages: array[int]) -> None:
        turns, num_pages = self._turns, self.num_pages
        seen = set(pages) if len(pages) > 1 else None
        if seen is not None and len(seen) != len(pages):
            ordered = sorted(pages)
            raise PageError(next(page for page, other in pairwise(ordered) if page == other))
        if len(pages) > _LOOP_LIMIT:
            ids = np.asarray(pages)
            if ids.min() >= 0 and ids.max() < num_pages and (np.frombuffer(turns, np.int64)[ids] % 2).all():
                return
        for page in pages:
            if not 0 <= page < num_pages or turns[page] % 2 == 0:
                raise PageError(page)
