"""The page pool: which pages are free, and who owns each of the others.

    owner      0 FREE      1 TREE      >= 2 the id of the one lease that fills it
    page id    0 ... num_pages - 1

The pool holds no tensors: a page id says where in a page store the KV of `page_size` tokens lies. A page's generation
counts how often it was freed, so a reader can tell that a page it looked up has since been given to someone else.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from radixkv.errors import ConfigError, InvariantError, PageError
from radixkv.tokens import as_count

__all__ = ["FREE", "TREE", "PagePool"]

FREE = 0
"""Owner of a page nobody uses."""
TREE = 1
"""Owner of a page that is part of the radix tree."""

_LOOP_LIMIT = 48  # below this a Python loop beats numpy's call overhead


class PagePool:
    """A free list of page ids with an owner and a generation for every page.

    Args:
        num_pages: pages in all, >= 1.

    >>> pool = PagePool(4)
    >>> pages = pool.allocate(2, owner=7)
    >>> pool.num_free, pool.owner(pages[0])
    (2, 7)
    >>> pool.free(pages, owner=7); pool.num_free
    4
    """

    __slots__ = ("_free", "_generation", "_owner", "num_pages")

    def __init__(self, num_pages: int) -> None:
        num_pages = as_count("num_pages", num_pages)
        if num_pages < 1:
            raise ConfigError("num_pages", num_pages, "at least 1")
        self.num_pages = num_pages
        self._free = array("i", range(num_pages - 1, -1, -1))  # a stack; low ids are given out first
        self._owner = array("q", bytes(8 * num_pages))
        self._generation = array("q", bytes(8 * num_pages))

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def owner(self, page: int) -> int:
        """Who owns `page`: FREE, TREE, or a lease id."""
        return self._owner[page]

    def generation(self, page: int) -> int:
        """How many times `page` was freed."""
        return self._generation[page]

    def generations(self, pages: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """[n] generations of [n] pages; a copy."""
        return np.frombuffer(self._generation, np.int64)[np.asarray(pages, np.int64)]

    def allocate(self, num_pages: int, owner: int) -> array[int]:
        """Take `num_pages` free pages for `owner`.

        Cost: O(num_pages). The caller makes sure that so many are free.
        """
        assert 0 <= num_pages <= len(self._free), (num_pages, len(self._free))
        cut = len(self._free) - num_pages
        pages = self._free[cut:]
        pages.reverse()
        del self._free[cut:]
        self._assign(pages, owner)
        return pages

    def free(self, pages: Sequence[int], owner: int) -> None:
        """Give back pages that `owner` owns; each one's generation moves on.

        Cost: O(len(pages)).

        Raises:
            PageError: a page is not owned by `owner` (freed twice, say); nothing is freed then.
        """
        self._require(pages, owner)
        if len(set(pages)) != len(pages):
            twice, _ = Counter(pages).most_common(1)[0]
            raise PageError(twice, FREE, owner)  # by the second time it would be free
        self._assign(pages, FREE)
        if len(pages) > _LOOP_LIMIT:
            np.frombuffer(self._generation, np.int64)[pages] += 1
        else:
            generation = self._generation
            for page in pages:
                generation[page] += 1
        self._free.extend(pages[::-1])

    def transfer(self, pages: Sequence[int], owner: int, to: int) -> None:
        """Move ownership of pages, from a lease to the tree say.

        Raises:
            PageError: a page is not owned by `owner`; nothing is moved then.
        """
        self._require(pages, owner)
        self._assign(pages, to)

    def owned_by(self, owner: int) -> list[int]:
        """Every page of one owner, ascending; O(num_pages), for checks and reports."""
        pages: list[int] = np.flatnonzero(np.frombuffer(self._owner, np.int64) == owner).tolist()
        return pages

    def check(self) -> None:
        """Recount everything.

        Raises:
            InvariantError: I1, a page is free and owned, or neither.
        """
        free = self._free.tolist()
        if len(set(free)) != len(free):
            raise InvariantError("I1", reason="a page is on the free list twice", free=len(free))
        if sorted(free) != self.owned_by(FREE):
            raise InvariantError("I1", reason="free list and owners differ", free=len(free))

    def _require(self, pages: Sequence[int], owner: int) -> None:
        owners, num_pages = self._owner, self.num_pages
        if len(pages) > _LOOP_LIMIT:
            ids = np.asarray(pages)
            if ids.min() >= 0 and ids.max() < num_pages and (np.frombuffer(owners, np.int64)[ids] == owner).all():
                return
        for page in pages:
            if not 0 <= page < num_pages:
                raise PageError(page, FREE, owner)
            if owners[page] != owner:
                raise PageError(page, owners[page], owner)

    def _assign(self, pages: Sequence[int], owner: int) -> None:
        if len(pages) > _LOOP_LIMIT:
            np.frombuffer(self._owner, np.int64)[pages] = owner
            return
        owners = self._owner
        for page in pages:
            owners[page] = owner
