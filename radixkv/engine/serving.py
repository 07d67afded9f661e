"""asyncio in front of the engine: one thread owns model, tree and pool; everybody else sends it what to do.

    event loop                                   the engine's thread
    submit, cancel, call ──▶ inbox (a queue) ──▶ between two steps: take all of it, then step while there is work
    Answer ◀── call_soon_threadsafe ◀─────────── the chunks of a step, all requests' in one wake-up

Nobody polls: the thread sleeps on its inbox while there is nothing to compute, an `Answer` on a future of its event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from queue import Empty, SimpleQueue
from threading import Thread
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from radixkv.engine.options import RequestOptions
from radixkv.engine.output import Chunk, Completion
from radixkv.engine.sampling import SamplingParams
from radixkv.errors import EngineClosed, QueueFull

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine, Prompt
    from radixkv.engine.request import Request

__all__ = ["Answer", "AsyncEngine"]

log = logging.getLogger("radixkv.engine")
T = TypeVar("T")


class Answer:
    """One request's answer as it comes: an async iterator of chunks, whose last one carries the completion.

    Leaving it unfinished does not end the request: `cancel()` does, as does `async with`.
    """

    def __init__(self, front: AsyncEngine, request: Request) -> None:
        self._front = front
        self._request = request
        self._chunks: deque[Chunk] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._news = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while not self._chunks:
            if self._ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._chunks.popleft()

    async def result(self) -> Completion:
        """Read to the end.

        Raises:
            RadixKVError: what ended the request instead.
        """
        completion = None
        async for chunk in self:
            completion = chunk.completion
        assert completion is not None
        return completion

    def cancel(self) -> None:
        """End the request, if it has not ended; its pages are free by the next step. Safe to call twice."""
        if not self._ended:
            self._front._send(lambda engine: engine._cancel([self._request]))

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def _take(self, chunks: list[Chunk], ended: bool, error: BaseException | None) -> None:
        """On the event loop: what a step brought."""
        self._chunks.extend(chunks)
        self._ended, self._error = ended, error
        self._news.set()


class AsyncEngine:
    """An engine served by a thread of its own, for one event loop.

    Args:
        engine: from now on nobody else may step it; it is closed with this object.

    Raises:
        RuntimeError: made outside a running event loop.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._loop = asyncio.get_running_loop()
        self._inbox: SimpleQueue[Callable[[Engine], object] | None] = SimpleQueue()
        self._answers: dict[int, Answer] = {}  # by id of the request; the engine's thread only
        self._pace = _Pace()
        self._shapers = ThreadPoolExecutor(2, "radixkv-shapes")
        self._closing = False
        self._gone = self._loop.create_future()
        self._thread = Thread(target=self._run, name="radixkv-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs and takes requests."""
        return self._thread.is_alive() and not self._closing

    async def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, options: RequestOptions | None = None
    ) -> Answer:
        """Put a request in the queue.

        Raises:
            As `Engine.generate`. QueueFull: too many wait. EngineClosed: after close().
        """
        if self._closing:
            raise EngineClosed
        try:
            shaped = params is not None and params.structure is not None  # its grammar may take long to compile
            pool = self._shapers if shaped else None
            request = await self._loop.run_in_executor(pool, self.engine._request, prompt, params, options)
        except AttributeError:  # closed meanwhile: what it needs is gone
            if self._closing:
                raise EngineClosed from None
            raise
        answer = Answer(self, request)

        def enter(engine: Engine) -> None:
            self._require_place(engine, request.options.tenant)
            engine._submit([request])
            self._answers[id(request)] = answer

        try:
            await self.call(enter)
        except asyncio.CancelledError:
            answer.cancel()  # after `enter` in the inbox, so nothing is left running
            raise
        return answer

    def _require_place(self, engine: Engine, tenant: str) -> None:
        """Refuse a request where too many wait; a full queue still has a place for whoever has less than its share of it."""
        waiting, limit = engine.num_waiting, engine.config.max_waiting
        if waiting < limit:
            return
        by_tenant = engine.waiting_by_tenant()
        share = max(limit // len(by_tenant.keys() | {tenant}), 1)
        if by_tenant[tenant] >= share or waiting >= 2 * limit:
            raise QueueFull(waiting, limit, self._pace.seconds_for(waiting // 4))

    async def call(self, act: Callable[[Engine], T]) -> T:
        """Run `act` on the engine's thread, between two steps, and wait for what it returns or raises."""
        if self._closing:
            raise EngineClosed
        done: asyncio.Future[T] = self._loop.create_future()

        def run(engine: Engine) -> None:
            try:
                outcome, error = act(engine), None
            except Exception as failure:
                outcome, error = None, failure
            self._tell(_resolve, done, outcome, error)

        self._send(run)
        try:
            await asyncio.wait((done, self._gone), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            done.cancel()
            raise
        if not done.done():  # the thread ended before it came to this
            raise EngineClosed
        return done.result()

    async def ended(self) -> None:
        """Wait until the engine's thread has ended: after close(), or because it failed."""
        await asyncio.shield(self._gone)

    async def close(self) -> None:
        """Cancel what runs, end the thread and close the engine. Safe to call twice."""
        if not self._closing:
            self._closing = True
            self._inbox.put(None)
            self._shapers.shutdown(wait=False, cancel_futures=True)
        await self.ended()

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_in(wait=not self.engine.busy):
                if self.engine.busy:
                    self.engine.step()
                self._hand_out()
        except BaseException:
            log.exception("the engine's thread ended")
            self._tell(_deliver, [(answer, [], True, EngineClosed()) for answer in self._answers.values()])
            self._answers.clear()
        finally:
            self._closing = True
            try:
                self.engine.close()
            except Exception:  # of a device that has failed: whoever waits for the end must still hear of it
                log.exception("the engine's memory could not be given back")
            self._hand_out()
            self._tell(self._gone.set_result, None)

    def _take_in(self, *, wait: bool) -> bool:
        """Do everything in the inbox; False when it says to end."""
        try:
            act = self._inbox.get(block=wait)
            while act is not None:
                act(self.engine)
                act = self._inbox.get_nowait()
        except Empty:
            return True
        return False

    def _hand_out(self) -> None:
        """Send what the last step brought, all of it in one call to the event loop."""
        parcels = []
        for key, answer in list(self._answers.items()):
            request = answer._request
            ended = request.finished
            if request.chunks or ended:
                chunks, request.chunks = request.chunks, []
                parcels.append((answer, chunks, ended, request.error))
                if ended:
                    self._pace.note(perf_counter())
                    del self._answers[key]
        if parcels:
            self._tell(_deliver, parcels)

    def _send(self, act: Callable[[Engine], object]) -> None:
        self._inbox.put(act)

    def _tell(self, act: Callable[..., object], *args: object) -> None:
        """Have the event loop call `act`; it may be gone by now, and nobody waits then."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(act, *args)


class _Pace:
    """How fast requests end, over the last of them."""

    def __init__(self) -> None:
        self._ends_s: deque[float] = deque(maxlen=32)

    def note(self, now_s: float) -> None:
        """One ended."""
        self._ends_s.append(now_s)

    def seconds_for(self, num_requests: int) -> float:
        """When so many more should have ended: whole seconds, 1 to 60."""
        if len(self._ends_s) < 2:
            return 1.0
        each_s = (self._ends_s[-1] - self._ends_s[0]) / (len(self._ends_s) - 1)
        return float(min(max(ceil(each_s * max(num_requests, 1)), 1), 60))


def _deliver(parcels: list[tuple[Answer, list[Chunk], bool, BaseException | None]]) -> None:
    for answer, chunks, ended, error in parcels:
        answer._take(chunks, ended, error)


def _resolve(done: asyncio.Future[Any], outcome: object, error: Exception | None) -> None:
    if done.cancelled():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(outcome)
