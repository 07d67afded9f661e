"""The continuous batch: requests that wait, requests that run, and the step that takes them further.

    submit ─▶ waiting ─ plan: admitted ─▶ running ─ its answer ends ─▶ finished
                 ▲                          │
                 └────── plan: preempted ───┘

scheduler.py decides, executor.py acts; here is who is where, and what happens to a request when something goes wrong.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch

from radixkv.cache import CacheStats
from radixkv.engine.config import EngineConfig
from radixkv.engine.executor import Executor, Piece
from radixkv.engine.output import FinishReason
from radixkv.engine.request import Request
from radixkv.engine.scheduler import Rules, State, plan
from radixkv.errors import DeadlineExceeded, PoolExhausted, QuotaExceeded, RequestInterrupted

__all__ = ["Batcher", "EngineStats"]

log = logging.getLogger("radixkv.engine")

_PROBED = 64  # waiting requests looked up before a step that may start some


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine did. Of ended requests: cached_tokens + computed_tokens = prompt_tokens.

    Attributes:
        requests: requests that ended, well or not.
        prompt_tokens, cached_tokens, computed_tokens: of those; a token computed again after a preemption counts once.
        generated_tokens: by those.
        recomputed_tokens: tokens that went through the model again after a preemption.
        preemptions: how often a running request had to make room.
        running, waiting: requests now.
        prefill_s: seconds spent on prompts.
        cache: the cache's counts.
    """

    requests: int
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    generated_tokens: int
    recomputed_tokens: int
    preemptions: int
    running: int
    waiting: int
    prefill_s: float
    cache: CacheStats

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed a second; 0 before the first."""
        return self.computed_tokens / self.prefill_s if self.prefill_s else 0.0


class Batcher:
    """The requests of an engine. Not thread-safe: the engine serialises the calls, `doom` aside.

    Args:
        executor: what they run on.
        config: how many run at once, and how many tokens a step has.
    """

    def __init__(self, executor: Executor, config: EngineConfig) -> None:
        self._executor = executor
        self._rules = Rules(
            page_size=config.page_size,
            max_running=config.max_running,
            step_tokens=config.prefill_chunk,
            mixed_tokens=min(config.mixed_tokens, config.prefill_chunk),
            chunk=config.exact_block if config.exact else 1,
        )
        self._waiting: dict[int, Request] = {}  # both by the id of their job
        self._running: dict[int, Request] = {}  # in order of admission
        self._credits: dict[str, float] = {}
        self._doomed: deque[Request] = deque()  # readers went away; taken off when no step is under way
        self._stepping = False
        self._requests = self._prompt_tokens = self._cached = self._computed = self._generated = 0
        self._recomputed = self._preemptions = 0

    @property
    def num_running(self) -> int:
        """Requests that run."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def waiting_by_tenant(self) -> Counter[str]:
        """How many requests of each tenant are in the queue. Cost: O(waiting)."""
        return Counter(request.options.tenant for request in self._waiting.values())

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running)

    def submit(self, requests: Sequence[Request]) -> None:
        """Put requests in the queue."""
        self._waiting.update((request.job.id, request) for request in requests)

    def step(self) -> None:
        """Advance everybody by one step's tokens."""
        self._stepping = True
        try:
            self._advance()
        finally:
            self._stepping = False
            self.reap()

    def doom(self, requests: Sequence[Request]) -> None:
        """Note that nobody reads these any more. Any thread may call this, at any moment."""
        self._doomed.extend(requests)

    def cancel_all(self) -> None:
        """End everything that waits or runs."""
        self.doom([*self._running.values(), *self._waiting.values()])
        self.reap()

    def stats(self) -> EngineStats:
        """Totals since the start."""
        return EngineStats(
            requests=self._requests,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached,
            computed_tokens=self._computed,
            generated_tokens=self._generated,
            recomputed_tokens=self._recomputed,
            preemptions=self._preemptions,
            running=len(self._running),
            waiting=len(self._waiting),
            prefill_s=self._executor.prefill_s,
            cache=self._executor.cache.stats(),
        )

    # -- one step -----------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        self._probe()
        stats = self._executor.cache.stats()
        state = State(
            waiting=[request.job for request in self._waiting.values()],
            running=[request.job for request in self._running.values()],
            num_free=stats.num_free,
            num_evictable=stats.num_evictable,
            now_s=perf_counter(),
            credits=self._credits,
        )
        todo = plan(state, self._rules)
        self._credits = todo.credits
        for job_id in todo.overdue:
            self._overdue(self._running.get(job_id) or self._waiting[job_id])
        for job_id in todo.preempted:
            self._preempt(self._running[job_id])
        for job_id in todo.admitted:
            self._start(self._waiting.pop(job_id))
        self._compute(
            [(self._running[share.job_id], share.num_tokens) for share in todo.work if share.job_id in self._running]
        )
        for job_id in todo.followers:
            if job_id in self._running:
                self._guarded([self._running[job_id]], partial(self._each, self._executor.attach))

    def _probe(self) -> None:
        """Look up those who wait longest unlooked, where somebody may start."""
        if self._waiting and (len(self._running) < self._rules.max_running or self._ranked()):
            stale = list(self._waiting.values())[:_PROBED]
            for request in stale:
                self._executor.probe(request)
            if len(self._waiting) > _PROBED:  # others' turn next
                for request in stale:
                    self._waiting[request.job.id] = self._waiting.pop(request.job.id)

    def _ranked(self) -> bool:
        """Whether anybody may have to make room: requests differ in priority or tenant."""
        jobs = [request.job for request in (*self._waiting.values(), *self._running.values())]
        return len({(job.priority, job.tenant) for job in jobs}) > 1

    def _start(self, request: Request) -> None:
        self._running[request.job.id] = request
        self._guarded([request], partial(self._each, self._executor.begin))

    def _preempt(self, request: Request) -> None:
        """Put a running request back in the queue; it will begin again from what it has published."""
        del self._running[request.job.id]
        self._executor.suspend(request)
        self._executor.note(request)
        self._waiting[request.job.id] = request
        self._preemptions += 1

    def _overdue(self, request: Request) -> None:
        self._fail([request], DeadlineExceeded(float(request.options.deadline_s or 0), len(request.output)))

    # -- compute ------------------------------------------------------------------------------------------------------

    def _compute(self, shares: Sequence[tuple[Request, int]]) -> None:
        """Give each request its tokens of a step. Those for whom no page is left end or make room, and only they."""
        ready = [(request, count) for request, count in shares if request.view and self._reserve(request, count)]
        ready = [(request, min(count, request.num_tokens - request.position)) for request, count in ready if request.view]
        if not ready:
            return
        for batch in self._executor.batches(ready):
            self._forward(batch)

    def _reserve(self, request: Request, count: int) -> bool:
        """Get pages for the next tokens, from others who rank lower if need be. Where that fails, this request ends."""
        stop = min(request.position + count, request.num_tokens)
        if request.position < len(request.prompt):
            stop = request.num_tokens  # of all the prompt at once: a prefill does not run dry half way
        while True:
            try:
                self._executor.reserve(request, stop)
            except (PoolExhausted, QuotaExceeded) as error:
                victim = self._victim(request, error)
                if victim is None:
                    log.warning("request ended: %s", error)
                    self._fail([request], error)
                    return False
                self._preempt(victim)
                if victim is request:
                    return False
            else:
                self._executor.note(request)
                return True

    def _victim(self, request: Request, error: PoolExhausted | QuotaExceeded) -> Request | None:
        """Who makes room for a request: the last in rank that holds pages it may have, itself if that is so; or nobody."""
        holders = [other for other in self._running.values() if other.lease is not None]
        if isinstance(error, QuotaExceeded):
            holders = [other for other in holders if other.job.namespace == request.job.namespace]
        if len(holders) < 2:
            return None
        return min(holders, key=self._rank)

    def _rank(self, request: Request) -> tuple[float, ...]:
        """Who makes room first has the smallest, as the scheduler has it: a tenant in debt, low priority, late arrival."""
        job = request.job
        return (self._credits.get(job.tenant, 0.0) > 0, job.priority, -job.arrived_s, -job.id)

    def _forward(self, batch: Sequence[Piece]) -> None:
        """One forward pass; where it fails, each request's part is tried alone, and who fails then ends."""
        requests = [piece.request for piece in batch]
        try:
            logits = self._executor.forward(batch)
        except Exception as error:
            if len(batch) == 1:
                log.warning("request ended: %s", error)
                self._fail(requests, error)
                return
            log.warning("a step of %d requests failed (%s); each is tried alone", len(batch), error)
            for piece in batch:
                self._forward([piece])
            return
        except BaseException:
            self._fail(requests, RequestInterrupted())
            raise
        rows = iter(logits)
        for piece in batch:
            row = next(rows) if piece.wants_logits else None
            self._guarded([piece.request], partial(self._take, piece, row))

    def _take(self, piece: Piece, logits: torch.Tensor | None, _: Sequence[Request]) -> None:
        """One request's part of a step, once it is computed: publish, and choose its next token."""
        request = piece.request
        ended = piece.stop == request.num_tokens
        self._executor.advance(piece)
        reason: FinishReason | None = None
        if logits is not None:
            reason = request.accept(logits)
        elif ended:
            reason = "length"  # max_tokens is 0: the prompt was all there was to do
        self._executor.note(request)
        if reason is not None:
            self._finish(request, reason)

    @staticmethod
    def _each(act: Callable[[Request], None], batch: Sequence[Request]) -> None:
        for request in batch:
            act(request)

    # -- end ----------------------------------------------------------------------------------------------------------

    def _finish(self, request: Request, reason: FinishReason) -> None:
        completion = request.complete(reason)
        if reason != "cancelled":
            self._executor.retain(request, completion)
        self._end(request)
        request.finish(completion)

    def _end(self, request: Request) -> None:
        """Take a request off the engine; its published pages stay cached."""
        self._running.pop(request.job.id, None)
        self._waiting.pop(request.job.id, None)
        self._executor.give_back(request)
        self._requests += 1
        self._prompt_tokens += request.cached + request.computed
        self._cached += request.cached
        self._computed += request.computed
        self._recomputed += request.recomputed
        self._generated += len(request.output)

    def _guarded(self, batch: Sequence[Request], act: Callable[[Sequence[Request]], None]) -> None:
        """Run one action; if it fails, the requests in it fail and all others go on.

        An interrupt goes on to whoever drives the engine; the requests it caught in the middle of a step end with it.
        """
        try:
            act(batch)
        except Exception as error:
            log.warning("%d requests end: %s", len(batch), error)
            self._fail(batch, error)
        except BaseException:
            self._fail(batch, RequestInterrupted())
            raise

    def _fail(self, batch: Sequence[Request], error: Exception) -> None:
        for request in batch:
            if not request.finished:
                self._end(request)
                request.error = error

    def reap(self) -> None:
        """End the doomed, unless a step is under way, which does it at its end."""
        while self._doomed and not self._stepping:
            request = self._doomed.popleft()
            if not request.finished:
                self._finish(request, "cancelled")
