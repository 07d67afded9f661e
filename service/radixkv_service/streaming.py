"""Server-sent events: the answer while it is made.

Headers are sent when the first chunk is there. What fails later is an `error` event, and the stream ends; nothing pretends
that a broken answer is a whole one.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import final

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from radixkv_service.errors import Problem, problem_of
from radixkv_service.run import Run

__all__ = ["DONE", "EventStream", "event", "openai_error"]

log = logging.getLogger("radixkv.service")

DONE = b"data: [DONE]\n\n"
"""The end of a stream, as OpenAI's clients know it."""


def event(value: BaseModel) -> bytes:
    """A value as an event."""
    return b"data: %s\n\n" % value.model_dump_json().encode()


def openai_error(problem: Problem) -> bytes:
    """A problem as an event, in the form that OpenAI's clients raise."""
    return b"event: error\ndata: %s\n\n" % problem.encode()


@final
class EventStream(Response):
    """A response of events.

    Args:
        run: what makes them; closed at the end, however that comes.
        events: encoded ones.
        headers: of the response.
        on_problem: how a failure in the middle looks.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        run: Run,
        events: AsyncIterator[bytes],
        headers: Mapping[str, str],
        on_problem: Callable[[Problem], bytes] = openai_error,
    ) -> None:
        super().__init__(None, 200, {"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._run = run
        self._events = events
        self._on_problem = on_problem

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send every event, as it comes."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for data in self._events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Exception as error:
                problem = problem_of(error)
                if problem.status == 500:
                    log.exception("a stream failed")
                scope["state"]["record"].note = problem.code or problem.kind
                await send({"type": "http.response.body", "body": self._on_problem(problem), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._run.close()
