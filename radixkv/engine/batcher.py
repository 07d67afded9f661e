"""The continuous batch: requests that wait, requests that run, and the step that takes them further.

    submit ─▶ waiting ─ plan: admitted ─▶ running ─ its answer ends ─▶ finished
                 ▲                          │
                 └────── plan: preempted ───┘

    step k     plan ─ launch k ─ land k - 1: take its tokens         (a GPU computes k meanwhile)
    step k     plan ─ launch k ─ land k                              (a CPU: there is nothing to do meanwhile)

scheduler.py decides, executor.py acts; here is who is where, and what happens to a request when something goes wrong.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from radixkv.cache import CacheStats
from radixkv.engine.config import EngineConfig
from radixkv.engine.executor import Executor, Flight
from radixkv.engine.output import FinishReason
from radixkv.engine.request import Request
from radixkv.engine.residence import Part
from radixkv.engine.scheduler import Plan, Rules, State, level, plan, rank
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
        assert config.prefill_chunk is not None and config.mixed_tokens is not None  # resolved for the device
        self._executor = executor
        self._rules = Rules(
            page_size=config.page_size,
            max_running=config.max_running,
            step_tokens=config.prefill_chunk,
            mixed_tokens=config.mixed_tokens,
            chunk=config.exact_block if config.exact else 1,
        )
        self._waiting: dict[int, Request] = {}  # both by the id of their job
        self._running: dict[int, Request] = {}  # in order of admission
        self._credits: dict[str, float] = {}
        self._flight: Flight | None = None  # what has been launched and has not landed
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
        except BaseException:
            self._drop_torn()
            raise
        finally:
            self._stepping = False
            self.reap()

    def _drop_torn(self) -> None:
        """End those whose flight an interrupt has lost: what was chosen for them nobody will take."""
        flying = set() if self._flight is None else {part.request.job.id for part in self._flight.parts}
        for request in list(self._running.values()):
            if _torn(request, request.job.id in flying):
                self._fail(request, RequestInterrupted())

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
        if self._flight is not None and (not self._executor.ahead or any(map(_structured, self._flight.rows))):
            self._settle()
        todo = self._plan()
        if self._flight is not None and (todo.overdue or todo.preempted):
            self._settle()  # whoever ends or makes room does so between two tokens
            todo = self._plan()
        self._credits = todo.credits
        for job_id in todo.overdue:
            self._overdue(self._running.get(job_id) or self._waiting[job_id])
        for job_id in todo.preempted:
            self._preempt(self._running[job_id])
        for job_id in todo.admitted:
            self._start(self._waiting.pop(job_id))
        last = self._flight
        self._compute(
            [(self._running[share.job_id], share.num_tokens) for share in todo.work if share.job_id in self._running]
        )
        if self._flight is last:  # nothing was launched behind it
            self._settle()
        for job_id in todo.followers:
            follower = self._running.get(job_id)
            if follower is not None:
                self._guarded(follower, partial(self._executor.attach, follower))

    def _plan(self) -> Plan:
        stats = self._executor.cache.stats()
        state = State(
            waiting=[request.job for request in self._waiting.values()],
            running=[request.job for request in self._running.values()],
            num_free=stats.num_free,
            num_evictable=stats.num_evictable,
            now_s=perf_counter(),
            credits=self._credits,
        )
        return plan(state, self._rules)

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
        self._guarded(request, partial(self._executor.begin, request))

    def _preempt(self, request: Request) -> None:
        """Put a running request back in the queue; it will begin again from what it has published."""
        self._executor.suspend(request)
        self._executor.note(request)
        self._waiting[request.job.id] = request
        del self._running[request.job.id]
        self._preemptions += 1

    def _overdue(self, request: Request) -> None:
        self._fail(request, DeadlineExceeded(float(request.options.deadline_s or 0), len(request.output)))

    # -- compute ------------------------------------------------------------------------------------------------------

    def _compute(self, shares: Sequence[tuple[Request, int]]) -> None:
        """Give each request its tokens of a step. Those for whom no page is left end or make room, and only they."""
        ready = [(request, count) for request, count in shares if request.begun and self._reserve(request, count)]
        ready = [(request, min(count, request.num_tokens - request.position)) for request, count in ready if request.begun]
        if not ready:
            return
        for batch in self._executor.batches(ready):
            self._forward(batch)

    def _reserve(self, request: Request, count: int) -> bool:
        """Get pages for the next tokens, from others who rank lower if need be. Where that fails, this request ends."""
        stop = min(request.position + count, request.num_tokens)
        if request.position < request.num_prompt:
            stop = request.num_tokens  # of all the prompt at once: a prefill does not run dry half way
        while True:
            try:
                self._executor.reserve(request, stop)
            except (PoolExhausted, QuotaExceeded) as error:
                if self._flight is not None:  # who ends with it makes room
                    self._settle()
                    if request.begun:
                        continue
                    return False
                victim = self._victim(request, error)
                if victim is None:
                    log.warning("request ended: %s", error)
                    self._fail(request, error)
                    return False
                self._preempt(victim)
                if victim is request:
                    return False
            except Exception as error:  # this request's own
                log.warning("request ended: %s", error)
                self._fail(request, error)
                return False
            else:
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
        """The scheduler's own order of who makes room."""
        job = request.job
        highest = max(other.job.priority for other in (*self._running.values(), *self._waiting.values()))
        return rank(job, level(job, highest, perf_counter(), self._rules), self._credits.get(job.tenant, 0.0))

    def _forward(self, batch: list[Part]) -> None:
        """Launch a pass, and land the one before. Where it fails, each part is tried alone, and who fails then ends."""
        try:
            flight = self._executor.launch(batch, self._flight)
        except Exception as error:
            self._settle()
            if len(batch) == 1:
                log.warning("request ended: %s", error)
                self._fail(batch[0].request, error)
                return
            log.warning("a step of %d requests failed (%s); each is tried alone", len(batch), error)
            for part in batch:
                if part.request.begun:
                    self._forward([Part(part.request, part.stop)])
            return
        except BaseException:
            for part in batch:
                self._fail(part.request, RequestInterrupted())
            raise
        last, self._flight = self._flight, flight
        try:
            for part in batch:
                if part.source < 0:
                    self._guarded(part.request, partial(self._publish, part))
        finally:  # a flight lands, or its tokens would be lost
            if self._executor.ahead:
                self._land(last)
            else:
                self._settle()

    def _publish(self, part: Part) -> None:
        self._executor.publish(part.request, part.stop)
        self._executor.note(part.request)

    def _settle(self) -> None:
        """Land what is under way."""
        flight, self._flight = self._flight, None
        self._land(flight)

    def _land(self, flight: Flight | None) -> None:
        """Take the tokens of a flight, as soon as they are known. Requests that have ended meanwhile need them no more."""
        if flight is None:
            return
        try:
            self._executor.land(flight)
        except Exception as error:
            log.warning("%d requests end: %s", len(flight.parts), error)
            for part in flight.parts:
                self._fail(part.request, error)
            return
        except BaseException:
            for part in flight.parts:
                self._fail(part.request, RequestInterrupted())
            raise
        row, interrupt = 0, None
        for part in flight.parts:
            try:
                if not part.request.finished:
                    self._guarded(part.request, partial(self._take, part, flight, row))
            except BaseException as error:  # a flight lands whole, or tokens would be lost: the interrupt waits for that
                interrupt = error
            row += part.wants_logits
        if interrupt is not None:
            raise interrupt

    def _take(self, part: Part, flight: Flight, row: int) -> None:
        """One request's part of a step, once it is computed: publish what is not yet, and take its next token."""
        request = part.request
        if part.source >= 0:
            self._executor.publish(request, part.stop)
        reason: FinishReason | None = None
        if part.wants_logits:
            assert flight.choice is not None
            token_id, logprob = flight.choice.read(row)
            request.pending -= 1
            reason = request.accept(token_id, logprob)
        elif part.is_last:
            reason = "length"  # max_tokens is 0: the prompt was all there was to do
        self._executor.note(request)
        if reason is not None:
            self._finish(request, reason)

    # -- end ----------------------------------------------------------------------------------------------------------

    def _finish(self, request: Request, reason: FinishReason) -> None:
        completion = request.complete(reason)
        if reason != "cancelled":
            try:
                self._executor.retain(request, completion)
            except Exception as error:  # how long to keep it is no part of the answer
                log.warning("an answer is kept without its retention: %s: %s", type(error).__name__, error)
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

    def _guarded(self, request: Request, act: Callable[[], None]) -> None:
        """Do something for a request; if it fails, this request fails and all others go on.

        An interrupt goes on to whoever drives the engine; the request it caught ends with it.
        """
        try:
            act()
        except Exception as error:
            log.warning("request ended: %s", error)
            self._fail(request, error)
        except BaseException:
            self._fail(request, RequestInterrupted())
            raise

    def _fail(self, request: Request, error: Exception) -> None:
        if not request.finished:
            self._end(request)
            request.error = error

    def reap(self) -> None:
        """End the doomed, unless a step is under way, which does it at its end."""
        while self._doomed and not self._stepping:
            request = self._doomed.popleft()
            if not request.finished:
                self._finish(request, "cancelled")
        if self._flight is not None and not (self._stepping or self.busy):
            self._settle()  # nobody waits for it, and nothing will be launched behind it


def _torn(request: Request, flying: bool) -> bool:
    """Whether tokens are being chosen for a request by no flight that is known."""
    if flying:
        return request.pending > 1
    return bool(request.pending) or (request.begun and request.position >= request.num_tokens)


def _structured(request: Request) -> bool:
    return request.structured
