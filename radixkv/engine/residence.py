"""Where the KV of a running request is: in a view of its own, or in its pages.

    InViews   a CPU without kernels: cached pages are loaded into a contiguous view, full pages are saved from it
    InPages   kernels read and write pages in place: nothing is loaded, nothing is saved, nothing exists twice

The executor keeps leases and positions; a residence brings the bytes to where the model looks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from radixkv.cache import PrefixCache
from radixkv.engine.paged import PagedRunner, PagedWork
from radixkv.engine.request import Request
from radixkv.engine.runner import ModelRunner, Work
from radixkv.engine.view import NO_ORIGIN, ViewPool
from radixkv.lease import Lease
from radixkv.store.device import DeviceStore
from radixkv_kernels.copies import copy_heads

__all__ = ["InPages", "InViews", "Part", "Residence"]


class Residence(Protocol):
    """What an executor asks of it.

    Attributes:
        ahead: whether a step may start before the tokens of the last one are known.
        in_pages: whether a request needs pages even where nothing of it is to be kept.
        runner: of the model.
    """

    ahead: bool
    in_pages: bool
    runner: Any

    def begin(self, request: Request, start: int) -> int:
        """Make the first `start` tokens, which its lease found, present; returns how many are."""

    def attach(self, request: Request, start: int) -> int:
        """The same for more tokens, found later, of which it has `position` already."""

    def reserved(self, request: Request, start: int) -> int:
        """Its lease has pages now; returns how many of the first `start` tokens are present."""

    def save(self, request: Request, first: int, last: int) -> None:
        """Bring whole pages [first, last) to the page store, before they are published."""

    def end(self, request: Request) -> None:
        """It runs no more; its lease, if any, is still live."""

    def forward(self, parts: Sequence[Part], previous: torch.Tensor | None) -> torch.Tensor:
        """Compute parts of requests: [m, V] logits of those that want them."""

    def close(self) -> None:
        """Let go of the memory."""


class Part:
    """Tokens [request.position, stop) of a request, for one forward pass."""

    __slots__ = ("is_last", "request", "source", "start", "stop")

    def __init__(self, request: Request, stop: int) -> None:
        self.request = request
        self.start = request.position
        self.stop = stop
        self.is_last = stop == request.num_tokens  # of its tokens for now: the next is to be chosen
        self.source = -1  # which of the tokens being chosen its first one is

    @property
    def wants_logits(self) -> bool:
        """Whether the token after it is to be chosen."""
        return self.is_last and self.request.max_output > 0

    def tokens(self) -> npt.NDArray[np.int32]:
        """[n] its tokens; one that is still being chosen is 0."""
        if self.source >= 0:
            return np.zeros(1, np.int32)
        return self.request.tokens(self.start, self.stop)


class InViews:
    """Views over one device's memory; a step is done when `forward` returns.

    Args:
        runner: of the model.
        store: where pages are.
        cache: knows the pages' generations.
        max_idle_tokens: capacity of views kept for the next request.
    """

    ahead = False
    in_pages = False

    def __init__(self, runner: ModelRunner, store: DeviceStore, cache: PrefixCache, max_idle_tokens: int) -> None:
        self.runner = runner
        self.views = ViewPool(store, max_idle_tokens)
        self._store = store
        self._cache = cache
        self._page_size = store.shape.page_size

    def begin(self, request: Request, start: int) -> int:
        """Take a view that holds as much of it as may be, and load the rest."""
        lease = request.lease
        if lease is None:
            request.view, _ = self.views.take(request.capacity)
            return 0
        origin = self._origin(lease, start // self._page_size)
        request.view, held = self.views.take(request.capacity, origin)
        self._load(request, held * self._page_size, start)
        return start

    def attach(self, request: Request, start: int) -> int:
        """Load what is new."""
        self._load(request, request.position, start)
        return start

    def reserved(self, request: Request, start: int) -> int:
        """Nothing to do: the head of a page was loaded with the rest."""
        return request.position

    def save(self, request: Request, first: int, last: int) -> None:
        """Copy them from the view."""
        assert request.view is not None and request.lease is not None
        request.view.save(self._store, request.lease.pages[first:last], first)

    def end(self, request: Request) -> None:
        """Give the view back, with a note of what it holds."""
        if request.view is None:
            return
        lease = request.lease
        written = 0 if lease is None else min(lease.num_published, request.position) // self._page_size
        self.views.give(request.view, NO_ORIGIN if lease is None else self._origin(lease, written))
        request.view = None

    def forward(self, parts: Sequence[Part], previous: torch.Tensor | None) -> torch.Tensor:
        """One pass over the weights; the logits are there when it returns."""
        works = []
        for part in parts:
            assert part.request.view is not None
            works.append(Work(part.request.view, part.tokens(), part.start, part.wants_logits))
        return self.runner.forward(works)

    def close(self) -> None:
        """Let go of the views."""
        self.views.clear()

    def _load(self, request: Request, start: int, stop: int) -> None:
        """Copy tokens [start, stop) of the lease's pages into the view."""
        lease, view = request.lease, request.view
        assert lease is not None and view is not None
        cut = lease.partial_page
        found = lease.pages[: lease.num_published // self._page_size]
        view.load(self._store, found if cut is None else [*found, cut], start, stop)

    def _origin(self, lease: Lease, num_pages: int) -> npt.NDArray[np.int64]:
        """[n, 2] page ids and generations of a lease's first `num_pages` pages."""
        pages = np.array(lease.pages[:num_pages], np.int64)
        return np.stack([pages, self._cache.generations(pages)], axis=1)


class InPages:
    """Pages in place; `forward` only puts a step in line.

    A match that ends inside a page is completed once the request has a page to copy that head to.

    Args:
        runner: of the model.
        store: where pages are.
    """

    ahead = True
    in_pages = True

    def __init__(self, runner: PagedRunner, store: DeviceStore) -> None:
        self.runner = runner
        self._store = store
        self._page_size = store.shape.page_size

    def begin(self, request: Request, start: int) -> int:
        """Whole pages are present as they are."""
        return start // self._page_size * self._page_size

    def attach(self, request: Request, start: int) -> int:
        """Whole pages are present as they are."""
        return max(start // self._page_size * self._page_size, request.position)

    def reserved(self, request: Request, start: int) -> int:
        """Copy the head of a page that the match ends in to the page that goes on from there."""
        lease = request.lease
        assert lease is not None
        cut = lease.partial_page
        if cut is None or request.position >= start:
            return request.position
        device, count = self._store.kv.device, lease.partial_tokens
        own = lease.pages[lease.num_published // self._page_size]
        moves = torch.tensor([[cut], [own], [count]], dtype=torch.int64).to(device, non_blocking=True)
        copy_heads(self._store.kv, moves[0], moves[1], moves[2])
        return start

    def save(self, request: Request, first: int, last: int) -> None:
        """They are where they belong."""

    def end(self, request: Request) -> None:
        """Its pages are its lease's."""
        request.page_table = None

    def forward(self, parts: Sequence[Part], previous: torch.Tensor | None) -> torch.Tensor:
        """Put one pass over the weights in line."""
        works = [
            PagedWork(part.tokens(), part.start, _page_table(part.request), part.wants_logits, part.source) for part in parts
        ]
        return self.runner.forward(works, previous)

    def close(self) -> None:
        """Wait for what is in line, then let go of pages and graphs."""
        self.runner.close()


def _page_table(request: Request) -> npt.NDArray[np.int32]:
    """[n] ids of a request's pages; made anew only where they have changed. Cost: O(pages) then, O(1) otherwise."""
    lease = request.lease
    assert lease is not None
    state = (lease.num_published, lease.num_own_pages)
    if request.page_table is None or request.page_table[0] != state:
        request.page_table = (state, np.array(lease.pages, np.int32))
    return request.page_table[1]
