"""The page pool: which pages are free.

    page id      0 ... num_pages - 1
    generation   how often a page was freed, counted from the first time that anybody asks

The pool holds no tensors: a page id says where in a page store the KV of `page_size` tokens lies. By a page's generation a
reader can tell that a page it looked up has since been given to someone else. Who uses a page is written nowhere but
where it is used, in the tree's nodes and in the leases; `check()` compares them with the free list
(docs/design/0008-native.md says what an owner for every page cost).
"""

from __future__ import annotations

from array import array
from typing import Final, final

import numpy as np
import numpy.typing as npt

from radixkv.errors import ConfigError, InvariantError
from radixkv.tokens import as_count

__all__ = ["PagePool"]

_LOOP_LIMIT: Final = 16  # below this a loop beats numpy's call overhead


@final
class PagePool:
    """A free list of page ids, and a generation for every page.

    Args:
        num_pages: pages in all, >= 1.

    >>> pool = PagePool(4)
    >>> pages = pool.allocate(2)
    >>> pages.tolist(), pool.num_free
    ([0, 1], 2)
    >>> pool.free(pages); pool.num_free
    4
    """

    __slots__ = ("_free", "_generation", "num_pages")

    def __init__(self, num_pages: int) -> None:
        num_pages = as_count("num_pages", num_pages)
        if num_pages < 1:
            raise ConfigError("num_pages", num_pages, "at least 1")
        self.num_pages = num_pages
        self._free = array("i", range(num_pages - 1, -1, -1))  # a stack; low ids are given out first
        self._generation: array[int] | None = None  # counting costs more than all the rest of `free`

    @property
    def num_free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    def generation(self, page: int) -> int:
        """How many times `page` was freed since the first call of this or of `generations`."""
        return self._counted()[page]

    def generations(self, pages: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """[n] generations of [n] pages; a copy."""
        return np.frombuffer(self._counted(), np.int64)[np.asarray(pages, np.int64)]

    def allocate(self, num_pages: int) -> array[int]:
        """Take `num_pages` free pages.

        Cost: one copy of the page ids. The caller makes sure that so many are free.
        """
        free = self._free
        cut = len(free) - num_pages
        assert 0 <= cut <= len(free), (num_pages, len(free))
        pages = free[cut:]
        pages.reverse()
        del free[cut:]
        return pages

    def free(self, pages: array[int]) -> None:
        """Give back pages that are in use, each of them once.

        Cost: O(len(pages)).

        Raises:
            InvariantError: I1, more pages would be free than there are; nothing is freed then.
        """
        if len(self._free) + len(pages) > self.num_pages:
            raise InvariantError("I1", reason="a page is freed that nobody uses", pages=pages[:8].tolist())
        if self._generation is not None:
            self._count(self._generation, pages)
        if len(pages) == 1:
            self._free.append(pages[0])
        else:
            self._free.extend(pages[::-1])

    def free_pages(self) -> list[int]:
        """Every free page, ascending. Cost: O(n log n), for checks and reports."""
        return sorted(self._free)

    def check(self) -> None:
        """Recount everything.

        Raises:
            InvariantError: I1, a page is on the free list twice, or does not exist.
        """
        free = self._free.tolist()
        if len(set(free)) != len(free) or not all(0 <= page < self.num_pages for page in free):
            raise InvariantError("I1", reason="a page is on the free list twice, or does not exist", free=len(free))

    def _counted(self) -> array[int]:
        if self._generation is None:
            self._generation = array("q", bytes(8 * self.num_pages))
        return self._generation

    def _count(self, generation: array[int], pages: array[int]) -> None:
        if len(pages) > _LOOP_LIMIT:
            np.frombuffer(generation, np.int64)[np.asarray(pages, np.int64)] += 1
        else:
            for page in pages:
                generation[page] += 1
