"""What every request passes before its route: an id, a key, a limit on its body; and a line of log after it.

request ─▶ record ─▶ Host ─▶ key or token ─▶ is the engine there? ─▶ body: type, size, time ─▶ route
              └────────────────── a problem, in the API's own form ◀──────────────────┘
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import replace

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radixkv_service.errors import Problem, problem_of
from radixkv_service.record import Record, request_id
from radixkv_service.service import Service

__all__ = ["ADMIN_ROUTES", "HOSTLESS_ROUTES", "OPEN_ROUTES", "Gate"]

log = logging.getLogger("radixkv.service")

OPEN_ROUTES = frozenset({"/health", "/ready", "/version", "/metrics", "/openapi.json", "/docs"})
"""Routes without a key; /metrics unless it is protected."""
HOSTLESS_ROUTES = frozenset({"/health", "/ready", "/version"})
"""Routes that answer whatever the Host header says: they tell a page of another site nothing about what was asked here."""
ADMIN_ROUTES = frozenset({"/flush_cache", "/reset_prefix_cache"})
"""Routes that need the admin token."""

_CLOSE = {"connection": "close"}
_AUTHENTICATE = {"www-authenticate": "Bearer"}


class Gate:
    """ASGI middleware in front of all routes.

    Args:
        app: the routes.
        service: what they serve.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = Record(request_id(headers.get("x-request-id")), f"{scope['method']} {_shown(scope['path'])}")
        scope.setdefault("state", {})["record"] = record
        reply = _Reply(record, send)
        try:
            problem = self._refusal(scope["path"], headers, record)
            body = b"" if problem is not None else await self._body(scope, headers, receive)
            if isinstance(body, Problem):
                problem = body
            if problem is not None:
                await reply.problem(problem)
            else:
                assert isinstance(body, bytes)
                await self.app(scope, _Replay(body, receive), reply)
        except Exception as error:
            record.note = type(error).__name__
            log.exception("id=%s failed", record.id)
            if reply.started:
                raise
            await reply.problem(problem_of(error))
        finally:
            record.template = getattr(scope.get("route"), "path", "other")
            record.write()
            self.service.metrics.answered(record)

    def _refusal(self, path: str, headers: Headers, record: Record) -> Problem | None:
        """Why this request is not let in, if it is not."""
        hosts = self.service.settings.hosts
        if hosts and path not in HOSTLESS_ROUTES and _host_name(headers.get("host", "")) not in hosts:
            message = "this Host is not served here; name it with --allowed-hosts (allowed_hosts)"
            return Problem(421, "invalid_request_error", message, code="unknown_host")
        keys, offered = self.service.keys, _offered(headers)
        if path in ADMIN_ROUTES:
            if not keys.is_admin(offered):
                message = "this route needs the admin token: Authorization: Bearer TOKEN"
                return Problem(401, "authentication_error", message, None, "invalid_admin_token", _AUTHENTICATE)
            record.tenant = "admin"
        elif path not in OPEN_ROUTES or (path == "/metrics" and self.service.settings.protect_metrics):
            tenant = keys.tenant(offered)
            if tenant is None and path == "/metrics" and keys.is_admin(offered):
                tenant = "admin"
            if tenant is None or (path == "/metrics" and keys.open and not keys.is_admin(offered)):
                message = "an API key is needed, and this is none: Authorization: Bearer KEY"
                return Problem(401, "authentication_error", message, None, "invalid_api_key", _AUTHENTICATE)
            record.tenant = tenant
        if path not in OPEN_ROUTES:
            return self.service.unavailable()
        return None

    async def _body(self, scope: Scope, headers: Headers, receive: Receive) -> bytes | Problem:
        """The whole body, or why it is not taken."""
        service, patience = self.service, asyncio.timeout(self.service.settings.body_timeout)
        service.receiving.add(patience)
        try:
            async with patience:
                body = await self._read(headers, receive)
        except TimeoutError:
            if service.status in ("draining", "failed") and (gone := service.unavailable()) is not None:
                return replace(gone, headers={**gone.headers, **_CLOSE})  # the drain did not wait
            return _late(service.settings.body_timeout)
        finally:
            service.receiving.discard(patience)
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if body and not isinstance(body, Problem) and not kind.endswith(("/json", "+json")):
            return Problem(415, "invalid_request_error", "send Content-Type: application/json", None, "not_json")
        return body

    async def _read(self, headers: Headers, receive: Receive) -> bytes | Problem:
        limit = self.service.settings.max_body_bytes
        too_large = Problem(
            413, "invalid_request_error", f"the body is larger than {limit} bytes (max_body_bytes)", None, "body_too_large"
        )
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > limit:
            return too_large
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return Problem(499, "invalid_request_error", "the client went away", code="client_gone")
            body += message.get("body", b"")
            if len(body) > limit:
                return too_large
            more = message.get("more_body", False)
        return bytes(body)


class _Reply:
    """The response on its way: gets the request's id, and tells the record its status."""

    def __init__(self, record: Record, send: Send) -> None:
        self._record = record
        self._send = send
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._record.status = self._record.status or message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._record.id.encode())]
        await self._send(message)

    async def problem(self, problem: Problem) -> None:
        body = problem.encode()
        usual = {"content-type": "application/json", "content-length": str(len(body))}
        await self(
            {"type": "http.response.start", "status": problem.status, "headers": _raw({**usual, **problem.headers}.items())}
        )
        await self({"type": "http.response.body", "body": body})


class _Replay:
    """The body that was read, once more; then whatever comes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def _raw(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers]


def _offered(headers: Headers) -> str | None:
    """The key or token that a request carries."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key") or headers.get("x-admin-token")


def _host_name(host: str) -> str:
    """A Host header without its port, and an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _late(seconds: float) -> Problem:
    message = f"the body did not come within {seconds:g} s (body_timeout)"
    return Problem(408, "timeout_error", message, None, "body_timeout", _CLOSE)


def _shown(path: str) -> str:
    return path if len(path) <= 100 else path[:97] + "..."
