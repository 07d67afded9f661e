"""The answers of one HTTP request: started together, read as one stream, ended together.

jobs ─▶ submit ─▶ answer 0, answer 1, ... ─▶ one queue ─▶ (index, chunk), as they come
the client goes away │ the server shuts down ─▶ cancel ─▶ the engine ends them all
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from starlette.requests import Request

from radixkv_service.errors import Problem, ProblemError
from radixkv_service.record import Record, record_of
from radixkv_service.service import Service

if TYPE_CHECKING:
    from radixkv.engine.options import RequestOptions
    from radixkv.engine.output import Chunk, Completion
    from radixkv.engine.sampling import SamplingParams
    from radixkv.engine.serving import Answer
    from radixkv.tokens import Tokens

__all__ = ["Job", "Run"]


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to make."""

    prompt: Tokens
    params: SamplingParams
    options: RequestOptions


@dataclass(slots=True)
class _Asked:
    """A prompt of the request: how many of its answers are being made, and those that are there."""

    waiting: int = 0
    answers: list[Completion] = field(default_factory=list)


class Run:
    """What one HTTP request has running; to be closed.

    Args:
        service: with the engine.
        request: whose client may go away.

    Attributes:
        completions: the finished answers, by their index.
    """

    def __init__(self, service: Service, request: Request) -> None:
        self._service = service
        self._record: Record = record_of(request)
        self._receive = request.receive
        self._answers: list[Answer] = []
        self._news: asyncio.Queue[tuple[int, Chunk | BaseException | None]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._first: tuple[int, Chunk] | None = None
        self._gone = False
        self._asked: list[_Asked] = []  # of each answer
        self.completions: dict[int, Completion] = {}

    async def start(self, jobs: Sequence[Job]) -> Chunk:
        """Submit every job, and wait for the first chunk of any: errors until then are responses of their own.

        Raises:
            RadixKVError: of the engine. ProblemError: the client went away, or the server shuts down.
        """
        try:
            self._service.running.add(self)
            self._tasks.append(asyncio.create_task(self._watch_client()))
            prompts: dict[int, _Asked] = {}
            for job in jobs:
                asked = prompts.setdefault(id(job.prompt), _Asked())
                asked.waiting += 1
                self._asked.append(asked)
            for index, job in enumerate(jobs):
                answer = await self._service.front.submit(job.prompt, job.params, job.options)
                self._answers.append(answer)
                self._tasks.append(asyncio.create_task(self._pump(index, answer)))
                if self._gone:
                    answer.cancel()
            self._first = await self._next()
        except BaseException:
            self.close()
            raise
        return self._first[1]

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Every chunk of every answer, with the answer's index.

        Raises:
            As `start`.
        """
        last_at: dict[int, float] = {}
        item = self._first
        while item is not None:
            index, chunk = item
            if chunk.token_id is not None:
                now = perf_counter()
                if index in last_at:
                    self._service.metrics.token_after(now - last_at[index])
                last_at[index] = now
            if chunk.completion is not None:
                self._finish(index, chunk.completion)
            yield item
            item = None if len(self.completions) == len(self._answers) else await self._next()

    async def finish(self) -> list[Completion]:
        """Read to the end; the completions in order.

        Raises:
            As `start`.
        """
        async for _ in self.chunks():
            pass
        return [self.completions[index] for index in range(len(self._answers))]

    def cancel(self) -> None:
        """End every answer that has not ended."""
        self._gone = True
        for answer in self._answers:
            answer.cancel()

    def close(self) -> None:
        """End what has not ended, and let go. Safe to call twice."""
        self.cancel()
        for task in self._tasks:
            task.cancel()
        for asked in self._asked:
            self._count_prompt(asked)
        self._service.running.discard(self)

    async def _next(self) -> tuple[int, Chunk]:
        while True:
            index, item = await self._news.get()
            if isinstance(item, BaseException):
                raise item
            if item is not None:
                if item.completion is not None and item.completion.finish_reason == "cancelled":
                    raise self._cancelled()
                return index, item

    async def _pump(self, index: int, answer: Answer) -> None:
        try:
            async for chunk in answer:
                self._news.put_nowait((index, chunk))
        except Exception as error:
            self._news.put_nowait((index, error))

    async def _watch_client(self) -> None:
        """Wait until the client goes away."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._record.status = 499
        self._record.note = "client gone"
        self.cancel()

    def _cancelled(self) -> ProblemError:
        if self._record.status == 499:
            return ProblemError(Problem(499, "invalid_request_error", "the client went away", code="client_gone"))
        message = "the server is shutting down; ask again, what was computed may stay cached"
        return ProblemError(Problem(503, "service_unavailable_error", message, None, "draining", {"retry-after": "5"}))

    def _finish(self, index: int, completion: Completion) -> None:
        self.completions[index] = completion
        self._service.metrics.finished(completion, self._record.tenant)
        self._record.output_tokens += len(completion.token_ids)
        if self._record.ttft_s is None and completion.token_ids:
            self._record.ttft_s = completion.ttft_s
        asked = self._asked[index]
        asked.answers.append(completion)
        asked.waiting -= 1
        if not asked.waiting:
            self._count_prompt(asked)

    def _count_prompt(self, asked: _Asked) -> None:
        """Count a prompt once, however many answers it has; what one found that another had just computed is no hit."""
        answers, asked.answers = asked.answers, []
        if answers:
            prompt, cached = answers[0].prompt_tokens, min(one.cached_tokens for one in answers)
            self._service.metrics.asked(prompt, cached, self._record.tenant)
            self._record.prompt_tokens += prompt
            self._record.cached_tokens += cached
