"""Acting on a plan: requests get their leases and views, and their tokens go through the model.

    begin     look up, lock what is found, load it into a view
    attach    take over what somebody else has published since, load that too
    compute   one forward pass over the tokens of many requests; whole pages are saved and published
    suspend   give lease and view back; what was published stays cached, and the request begins again from there

Every call leaves each request either further on or as it was. What raises here is one request's own fault, except where
the docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from radixkv.cache import PrefixCache
from radixkv.engine.build import EngineParts
from radixkv.engine.output import Completion
from radixkv.engine.request import Request
from radixkv.engine.runner import ModelRunner, Work
from radixkv.engine.view import NO_ORIGIN, ViewPool
from radixkv.lease import Lease
from radixkv.tokens import Tokens

__all__ = ["Executor", "Piece"]

_IDLE_CONTEXTS, _IDLE_SHARE = 2, 0.25  # idle working views hold at most so many contexts, and this share of the pool


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [request.position, stop) of a request, for one forward pass."""

    request: Request
    stop: int

    @property
    def wants_logits(self) -> bool:
        """Whether its last token is the last known one, so that the next is to be chosen."""
        return self.stop == self.request.num_tokens and self.request.max_output > 0


class Executor:
    """What requests hold while they run, and the model they run on. Not thread-safe: the engine serialises the calls.

    Attributes:
        runner: the model.
        store: where the pages' bytes are.
        cache: which prefix stands in which pages.
        prefill_s: seconds spent on prompts: a step's time is shared out by tokens.
    """

    def __init__(self, parts: EngineParts) -> None:
        self.runner: ModelRunner = parts.runner
        self.store = parts.store
        self.cache: PrefixCache = parts.cache
        self.prefill_s = 0.0
        self._config = parts.config
        self._page_size = parts.config.page_size
        pool_tokens = parts.store.num_pages * self._page_size
        self._views = ViewPool(parts.store, min(_IDLE_CONTEXTS * parts.max_context, int(pool_tokens * _IDLE_SHARE)))

    def probe(self, request: Request) -> None:
        """Note what a waiting request would find. Cost: O(T) token compares."""
        if not request.use_cache:
            return
        job, namespace = request.job, request.options.namespace
        found = self.cache.probe(request.prompt, namespace)  # of a resumed one too: close enough to decide by
        job.num_cached, job.num_locked = found
        usage = self.cache.usage(namespace)
        if usage.max_pages is not None:
            job.room_pages = max(usage.max_pages - usage.num_pages - usage.num_leased, 0) + usage.num_evictable

    # -- begin and end ------------------------------------------------------------------------------------------------

    def begin(self, request: Request) -> None:
        """Give a request its lease, and a view loaded with what the cache has; pages for the rest come with `reserve`.

        Raises:
            What the cache or the device raises; then `give_back` is to be called.
        """
        if not request.use_cache:
            request.view, _ = self._views.take(request.capacity)
            return
        lease = request.lease = self._lease(request)
        start = self._usable(lease.num_matched)
        origin = self._origin(lease, start // self._page_size)
        request.view, held = self._views.take(request.capacity, origin)
        self._load(request, held * self._page_size, start)
        request.move(start, computed=False)  # only now: a view that failed to load must not pass for loaded
        request.job.num_found = lease.num_published // self._page_size
        self.note(request)

    def attach(self, request: Request) -> None:
        """Take over what others have published beyond what is computed here. Cost: one copy of it into the view."""
        lease = request.lease
        if lease is None or not lease.attach(self._limit(request)):
            return
        start = self._usable(lease.num_matched)
        if start > request.position:
            self._load(request, request.position, start)
            request.move(start, computed=False)
        request.job.num_found = lease.num_published // self._page_size
        self.note(request)

    def reserve(self, request: Request, stop: int) -> None:
        """Give tokens up to `stop` a slot.

        Raises:
            PoolExhausted, QuotaExceeded: too few pages; nothing has changed then.
        """
        lease = request.lease
        if lease is None:
            return
        if lease.num_tokens < stop:
            lease.extend(request.tokens(lease.num_tokens, stop))
        elif _slots(lease, self._page_size) < stop:
            lease.extend()

    def retain(self, request: Request, completion: Completion) -> None:
        """Let a request that is complete say how much to keep which of its tokens, now that it knows them."""
        ask, lease = request.options.retain_at_end, request.lease
        if ask is not None and lease is not None:
            lease.retain(ask(completion))

    def give_back(self, request: Request) -> None:
        """Take lease and view from a request, in whatever state it is; what it published stays cached."""
        lease = request.lease
        if request.view is not None:
            written = 0 if lease is None else min(lease.num_published, request.position) // self._page_size
            self._views.give(request.view, NO_ORIGIN if lease is None else self._origin(lease, written))
            request.view = None
        if lease is not None:
            lease.release()
            request.lease = None

    def suspend(self, request: Request) -> None:
        """Make a running request one that waits, and loses nothing but what no whole page holds."""
        self.give_back(request)
        request.move(0, computed=False)
        request.job.resumed = True

    def note(self, request: Request) -> None:
        """Keep what the scheduler sees of a request true."""
        job, lease = request.job, request.lease
        job.num_tokens = request.num_tokens
        job.max_output = request.max_output - len(request.output)
        job.position = request.position
        job.num_pages = 0 if lease is None else lease.num_published // self._page_size + lease.num_own_pages

    def _lease(self, request: Request) -> Lease:
        """Look its sequence up, and lock what is found; the last token's logits are needed, so it is never found."""
        options, limit = request.options, self._limit(request)
        if request.cursor is not None:
            request.cursor.append(request.tokens(request.cursor.num_tokens, request.num_tokens))
            sought: object = request.cursor
        else:
            sought = request.prompt if not request.output else Tokens(request.tokens(0, request.num_tokens))
        return self.cache.acquire(
            sought, options.namespace, limit=limit, owner="engine", tag=options.tag, retention=options.retention
        )

    def _limit(self, request: Request) -> int:
        """Tokens that a request may find. In exact mode none of its answer: what it decoded, it computes as it did."""
        if self._config.exact:
            return min(len(request.prompt), request.num_tokens - 1)
        return request.num_tokens - 1

    def _load(self, request: Request, start: int, stop: int) -> None:
        """Copy tokens [start, stop) of the lease's pages into the view."""
        lease, view = request.lease, request.view
        assert lease is not None and view is not None
        cut = lease.partial_page
        found = lease.pages[: lease.num_published // self._page_size]
        view.load(self.store, found if cut is None else [*found, cut], start, stop)

    def _usable(self, num_matched: int) -> int:
        """Of so many matched tokens, those to start after: in exact mode, whole blocks."""
        block = self._config.exact_block
        return num_matched // block * block if self._config.exact else num_matched

    def _origin(self, lease: Lease, num_pages: int) -> npt.NDArray[np.int64]:
        """[n, 2] page ids and generations of a lease's first `num_pages` pages."""
        pages = np.array(lease.pages[:num_pages], np.int64)
        return np.stack([pages, self.cache.generations(pages)], axis=1)

    # -- compute ------------------------------------------------------------------------------------------------------

    def batches(self, shares: Sequence[tuple[Request, int]]) -> Iterator[list[Piece]]:
        """Cut a step's work into forward passes: one of all, or in exact mode each block and each token alone.

        A batch is cut when it is asked for, from where its request stands by then.
        """
        if not self._config.exact:
            yield [Piece(request, request.position + count) for request, count in shares]
            return
        for request, num_tokens in shares:
            stop = request.position + num_tokens
            while request.position < stop and request.view is not None:
                yield [Piece(request, self._next_cut(request))]  # beyond `stop`, where that lies inside a block

    def _next_cut(self, request: Request) -> int:
        """In exact mode: where the pass ends that begins at a request's position."""
        block, end = self._config.exact_block, len(request.prompt)
        if request.position >= end:
            return request.position + 1
        return min((request.position // block + 1) * block, end)

    def forward(self, batch: Sequence[Piece]) -> torch.Tensor:
        """Compute the KV of a batch's tokens into their views, whose positions stay: `advance` moves them.

        Cost: one pass over the weights.

        Returns:
            [m, V] logits of the last token of each piece that wants them, in order.

        Raises:
            What the model or the device raises; no request has changed then.
        """
        started = perf_counter()
        works = []
        for piece in batch:
            request = piece.request
            assert request.view is not None
            tokens = request.tokens(request.position, piece.stop)
            works.append(Work(request.view, tokens, request.position, piece.wants_logits))
        logits = self.runner.forward(works)
        in_prompts = sum(max(min(p.stop, len(p.request.prompt)) - p.request.position, 0) for p in batch)
        self.prefill_s += (perf_counter() - started) * in_prompts / sum(p.stop - p.request.position for p in batch)
        return logits

    def advance(self, piece: Piece) -> None:
        """The KV up to `piece.stop` is in the view: move there, save whole pages, and let everybody find them."""
        request, size = piece.request, self._page_size
        request.move(piece.stop, computed=True)
        lease = request.lease
        if lease is None:
            return
        ready = piece.stop
        if self._config.exact:  # what decoding wrote is not, bit for bit, what a prefill writes
            ready = min(ready, len(request.prompt)) // self._config.exact_block * self._config.exact_block
        first, last = lease.num_published // size, ready // size
        if last > first:
            assert request.view is not None
            request.view.save(self.store, lease.pages[first:last], first)
            first += lease.commit(last * size)  # the first of them somebody else had published
            begin = max(first * size, request.cached)  # the head of a page may have been copied
            request.written += max(min(last * size, len(request.prompt) // size * size) - begin, 0)

    def close(self) -> None:
        """Forget everything, and give back the memory."""
        self.cache.flush()
        del self.store, self._views, self.runner


def _slots(lease: Lease, page_size: int) -> int:
    """Tokens of a lease that have a page."""
    return lease.num_published + lease.num_own_pages * page_size
