"""Acting on a plan: requests get their leases and views, and their tokens go through the model.

    begin     look up, lock what is found
    attach    take over what somebody else has published since
    launch    one forward pass over the tokens of many requests, and the choice of their next ones
    publish   whole pages go to the cache
    land      the chosen tokens are known
    suspend   give the lease back; what was published stays cached, and the request begins again from there

On a GPU a launch only puts work in line. The next step is launched before this one has landed, from tokens that only the
device knows so far; what they turn out to be is looked at while the device computes (docs/design/0016-ahead.md).

Every call leaves each request either further on or as it was. What raises here is one request's own fault, except where
the docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from radixkv.cache import PrefixCache
from radixkv.engine.build import EngineParts
from radixkv.engine.choice import Choice
from radixkv.engine.output import Completion
from radixkv.engine.request import Request
from radixkv.engine.residence import Part
from radixkv.lease import Lease
from radixkv.tokens import Tokens

__all__ = ["Executor", "Flight"]


@dataclass(slots=True)
class Flight:
    """A forward pass that is under way, or done.

    Attributes:
        parts: what it computes.
        rows: the requests that a token is chosen for, in the order of the choice.
        choice: their tokens; None where there are none.
        done: on a GPU, where nothing is chosen: when it is computed.
        started_s: when it was put in line.
        prompt_share: how much of its tokens are of prompts, 0 to 1.
    """

    parts: list[Part]
    rows: list[Request]
    choice: Choice | None
    done: torch.cuda.Event | None
    started_s: float
    prompt_share: float


class Executor:
    """What requests hold while they run, and the model they run on. Not thread-safe: the engine serialises the calls.

    Attributes:
        residence: where the KV of running requests is, and the model's runner.
        store: where the pages' bytes are.
        cache: which prefix stands in which pages.
        prefill_s: seconds spent on prompts: a step's time is shared out by tokens.
        ahead: whether a step may be launched before the last one has landed.
    """

    def __init__(self, parts: EngineParts) -> None:
        self.residence = parts.residence
        self.store = parts.store
        self.cache: PrefixCache = parts.cache
        self.prefill_s = 0.0
        self.ahead = parts.residence.ahead and not parts.config.exact
        self._config = parts.config
        self._page_size = parts.config.page_size
        self._landed_s = 0.0

    def probe(self, request: Request) -> None:
        """Note what a waiting request would find. Cost: O(T) token compares."""
        job, namespace = request.job, request.options.namespace
        if not job.paged:
            return
        if request.use_cache:
            found = self.cache.probe(request.prompt, namespace)  # of a resumed one too: close enough to decide by
            job.num_cached, job.num_locked = found
        usage = self.cache.usage(namespace)
        if usage.max_pages is not None:
            job.room_pages = max(usage.max_pages - usage.num_pages - usage.num_leased, 0) + usage.num_evictable

    # -- begin and end ------------------------------------------------------------------------------------------------

    def begin(self, request: Request) -> None:
        """Give a request its lease, and bring what the cache has of it; pages for the rest come with `reserve`.

        Raises:
            What the cache or the device raises; then `give_back` is to be called.
        """
        request.begun = True
        if request.use_cache:
            lease = request.lease = self._lease(request)
            reached = self.residence.begin(request, self._usable(lease.num_matched))
            request.move(reached, computed=False)  # only now: what failed to load must not pass for loaded
            request.job.num_found = lease.num_published // self._page_size
        else:
            if self.residence.in_pages:  # pages that nobody hears of: a lease over no tokens, with room to spare
                request.lease = self.cache.acquire(b"", request.options.namespace, owner="engine")
            self.residence.begin(request, 0)
        self.note(request)

    def attach(self, request: Request) -> None:
        """Take over what others have published beyond what is computed here. Cost: at most one copy of it."""
        lease = request.lease
        if lease is None or not request.use_cache or not lease.attach(self._limit(request)):
            return
        start = self._usable(lease.num_matched)
        if start > request.position:
            request.move(self.residence.attach(request, start), computed=False)
        request.job.num_found = lease.num_published // self._page_size
        self.note(request)

    def reserve(self, request: Request, stop: int) -> None:
        """Give tokens up to `stop` a slot, the last of which may be one that is still being chosen.

        Cost: nothing where the last page has room; else what `Lease.extend` costs.

        Raises:
            PoolExhausted, QuotaExceeded: too few pages; nothing has changed then.
        """
        lease = request.lease
        if lease is None or _slots(lease, self._page_size) >= stop:
            return
        if not request.use_cache:
            lease.extend(num_spare=stop)
        else:
            known = max(min(stop, request.num_known), lease.num_tokens)
            lease.extend(request.tokens(lease.num_tokens, known), num_spare=max(stop - known, 0))
            start = self._usable(lease.num_matched)
            if start > request.position:
                request.move(self.residence.reserved(request, start), computed=False)
        self.note(request)

    def retain(self, request: Request, completion: Completion) -> None:
        """Let a request that is complete say how much to keep which of its tokens, now that it knows them."""
        ask, lease = request.options.retain_at_end, request.lease
        if ask is not None and lease is not None:
            lease.retain(ask(completion))

    def give_back(self, request: Request) -> None:
        """Take lease and view from a request, in whatever state it is; what it published stays cached.

        A step under way may still write to its pages; whoever gets them next writes after it.
        """
        self.residence.end(request)
        lease = request.lease
        if lease is not None:
            written = min(request.position, request.num_known)
            if not lease.released:  # an interrupt may have come between the release and the line after it
                if request.use_cache and lease.num_tokens < written:  # what has a slot: who goes on from here finds it
                    lease.extend(request.tokens(lease.num_tokens, written))
                lease.release()
            request.lease = None
        request.begun = False

    def suspend(self, request: Request) -> None:
        """Make a running request one that waits, and loses nothing but what no whole page holds."""
        assert not request.pending
        self.give_back(request)
        request.move(0, computed=False)
        request.job.resumed = True

    def note(self, request: Request) -> None:
        """Keep what the scheduler sees of a request true."""
        job, lease = request.job, request.lease
        job.num_tokens = request.position if request.complete_after_pending else request.num_tokens
        job.max_output = request.max_output - len(request.output) - request.pending
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
        if not self._config.exact:
            return request.num_tokens - 1
        limit = min(request.num_prompt, request.num_tokens - 1)
        if self.residence.in_pages:  # a block that is begun anew is written from its first token on: to no page of others
            limit = self._usable(min(self.cache.match(request.prompt, request.options.namespace), limit))
        return limit

    def _usable(self, num_matched: int) -> int:
        """Of so many matched tokens, those to start after: in exact mode, whole blocks."""
        block = self._config.exact_block
        return num_matched // block * block if self._config.exact else num_matched

    # -- compute ------------------------------------------------------------------------------------------------------

    def batches(self, shares: Sequence[tuple[Request, int]]) -> Iterator[list[Part]]:
        """Cut a step's work into forward passes: one of all, or in exact mode each block and each token alone.

        A batch is cut when it is asked for, from where its request stands by then.
        """
        if not self._config.exact:
            yield [Part(request, request.position + count) for request, count in shares]
            return
        for request, num_tokens in shares:
            stop = request.position + num_tokens
            while request.position < stop and request.begun:
                yield [Part(request, self._next_cut(request))]  # beyond `stop`, where that lies inside a block

    def _next_cut(self, request: Request) -> int:
        """In exact mode: where the pass ends that begins at a request's position."""
        block, end = self._config.exact_block, request.num_prompt
        if request.position >= end:
            return request.position + 1
        return min((request.position // block + 1) * block, end)

    def launch(self, parts: list[Part], last: Flight | None) -> Flight:
        """Put a forward pass in line and choose the next tokens; nothing is waited for where a device does both.

        Cost: one pass over the weights.

        Args:
            parts: what to compute, of requests whose pages are reserved.
            last: the flight that has not landed yet; tokens it chooses are taken from there.

        Raises:
            What the model or the device raises; no request has changed then.
        """
        started = perf_counter()
        sources = {} if last is None else {request.job.id: row for row, request in enumerate(last.rows)}
        for part in parts:
            if part.request.pending and part.stop > part.request.num_known:
                part.source = sources[part.request.job.id]
        previous = last.choice.tokens if last is not None and last.choice is not None else None
        logits = self.residence.forward(parts, previous)
        rows = [part.request for part in parts if part.wants_logits]
        choice = Choice([request.sampler(logits) for request in rows], logits) if rows else None
        in_prompts = sum(max(min(part.stop, part.request.num_prompt) - part.start, 0) for part in parts)
        share = in_prompts / sum(part.stop - part.start for part in parts)
        for part in parts:
            part.request.move(part.stop, computed=True)
            part.request.pending += part.wants_logits
        return Flight(parts, rows, choice, None if rows else self._event(), started, share)

    def _event(self) -> torch.cuda.Event | None:
        """Recorded after what is in line by now; None on a CPU."""
        if not self.store.kv.is_cuda:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.store.kv.device))
        return event

    def land(self, flight: Flight) -> None:
        """Wait until a flight has chosen its tokens.

        Raises:
            RuntimeError: the device failed.
        """
        if flight.choice is not None:
            flight.choice.wait()
        elif flight.done is not None and any(part.is_last for part in flight.parts):
            flight.done.synchronize()  # somebody is told that his prompt was computed
        now = perf_counter()
        self.prefill_s += (now - max(flight.started_s, self._landed_s)) * flight.prompt_share
        self._landed_s = now

    def publish(self, request: Request, stop: int) -> None:
        """The KV up to `stop`, all of known tokens, is written or in line: let everybody find its whole pages."""
        size, lease = self._page_size, request.lease
        if lease is None or not request.use_cache:
            return
        ready = stop
        if self._config.exact:  # what decoding wrote is not, bit for bit, what a prefill writes
            ready = min(ready, request.num_prompt) // self._config.exact_block * self._config.exact_block
        first, last = lease.num_published // size, ready // size
        if last > first:
            if lease.num_tokens < last * size:
                lease.extend(request.tokens(lease.num_tokens, last * size))
            self.residence.save(request, first, last)
            first += lease.commit(last * size)  # the first of them somebody else had published
            begin = max(first * size, request.cached)  # the head of a page may have been copied
            request.written += max(min(last * size, request.num_prompt // size * size) - begin, 0)

    def close(self) -> None:
        """Forget everything, and give back the memory."""
        self.cache.flush()
        self.residence.close()
        del self.store, self.residence


def _slots(lease: Lease, page_size: int) -> int:
    """Tokens of a lease that have a page."""
    return lease.num_published + lease.num_own_pages * page_size
