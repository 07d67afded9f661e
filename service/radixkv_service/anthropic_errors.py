"""Errors of the Messages routes in Anthropic's form, wherever they came from.

    route, validation, gate ──▶ OpenAI's error object ── MessagesForm ──▶ {"type": "error", "error": {...}, "request_id"}

A key that is missing or a body that is too large is refused before any route is reached, so the form is given last.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radixkv_service.anthropic_answers import ErrorDetail, ErrorMessage
from radixkv_service.errors import Problem

__all__ = ["MessagesForm", "error_event"]

_PREFIX = "/v1/messages"
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _kind(status: int) -> str:
    return _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")


def error_event(request_id: str) -> Callable[[Problem], bytes]:
    """What makes the event of a failure in the middle of a stream."""

    def encode(problem: Problem) -> bytes:
        return b"event: error\ndata: %s\n\n" % _translated(problem.status, problem.encode(), request_id)

    return encode


def _translated(status: int, body: bytes, request_id: str | None) -> bytes:
    """An error in OpenAI's form, in Anthropic's."""
    error: dict[str, Any] = json.loads(body)["error"]
    detail = ErrorDetail(type=_kind(status), message=error["message"], param=error["param"], code=error["code"])
    return ErrorMessage(error=detail, request_id=request_id).model_dump_json().encode()


class MessagesForm:
    """ASGI middleware around everything: gives responses of the Messages routes Anthropic's header and form of errors.

    Args:
        app: the gate, and the routes behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request through."""
        ours = scope["type"] == "http" and (scope["path"] == _PREFIX or scope["path"].startswith(f"{_PREFIX}/"))
        await self.app(scope, receive, _Form(send) if ours else send)


class _Form:
    """A response on its way; the start of an error waits for its body."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message["headers"]))
            if "x-request-id" in headers:
                headers["request-id"] = headers["x-request-id"]
            message = {**message, "headers": headers.raw}
            if message["status"] >= 400:
                self._start = message
                return
        elif self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._error(self._start)
            return
        await self._send(message)

    async def _error(self, start: Message) -> None:
        headers = MutableHeaders(raw=start["headers"])
        body = _translated(start["status"], bytes(self._body), headers.get("request-id"))
        headers["content-length"] = str(len(body))
        self._start = None
        await self._send({**start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})
