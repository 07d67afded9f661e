"""The HTTP/1.1 connection: uvicorn's on httptools, with an end to every wait for a client.

connected ──▶ headers ──▶ body ──▶ answer ──▶ idle ──▶ ...
   └─ header_timeout ─┘  (gate)    │     └ keep_alive_timeout
                                   └ a full socket: write_timeout, then the connection is cut
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from radixkv_service.errors import Problem

__all__ = ["ConnectionLimits", "GuardedConfig", "GuardedProtocol"]

_OFFER = frozenset({b"upgrade", b"http2-settings"})
_MAX_HEADER_BYTES = 64 * 1024
_LINGER_S = 5.0  # an answer that came before the body's end: so long the rest is read and dropped


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How long a connection waits for its client.

    Attributes:
        header_s: for the whole of a request's headers.
        write_s: for a full socket to be read.
    """

    header_s: float
    write_s: float


class GuardedConfig(Config):
    """uvicorn's configuration, and the limits of a connection."""

    def __init__(self, app: Any, limits: ConnectionLimits, **settings: Any) -> None:
        super().__init__(app, http=GuardedProtocol, ws="none", **settings)
        self.limits = limits


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, config: Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        assert isinstance(config, GuardedConfig)
        self.parser = _OneProtocolParser(self)
        self._limits = config.limits
        self._timer: asyncio.TimerHandle | None = None  # of the headers, or of what follows an early answer
        self._write_timer: asyncio.TimerHandle | None = None
        self._in_headers = False
        self._in_message = False
        self._header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected; it may not be silent for ever."""
        super().connection_made(transport)
        self._arm(self._limits.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._disarm()
        self._writable()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came: count those of headers, which the parser would take without end."""
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > _MAX_HEADER_BYTES:
                self._refuse(Problem(431, "invalid_request_error", "the headers are too large", code="headers_too_large"))
        elif not self._in_message and self.timeout_keep_alive_task is None and self._answered:
            self._arm(self._limits.header_s)  # empty lines between requests stop the idle timer, and begin nothing

    @property
    def _answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._in_headers = self._in_message = True
        self._header_bytes = 0
        self._arm(self._limits.header_s)

    def on_headers_complete(self) -> None:
        """The application takes over."""
        if self.upgrade_offered:
            return
        self._in_headers = False
        self._disarm()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is here, or what was left of it."""
        if self.upgrade_offered:
            return
        self._in_message = False
        super().on_message_complete()
        if self._answered:
            self._disarm()

    @property
    def upgrade_offered(self) -> bool:
        """Whether the headers just read offer another protocol, and will be read again without the offer."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def head_without_offer(self) -> bytes:
        """The request's line and headers once more, less those that offer another protocol."""
        line = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = (b"%s: %s\r\n" % (name, value) for name, value in self.headers if name not in _OFFER)
        return line + b"".join(kept) + b"\r\n"

    def on_response_complete(self) -> None:
        """The answer is written; where the body is still coming, it is read for a while, so that the client reads it."""
        super().on_response_complete()
        if self._in_message and not self._in_headers and not self.transport.is_closing():
            self._arm(_LINGER_S)

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._writable()

    def send_400_response(self, msg: str) -> None:
        """Not HTTP."""
        self._refuse(Problem(400, "invalid_request_error", msg, code="bad_http"))

    def _writable(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._answered and not self._in_headers:
            self.transport.close()
            return
        message = f"the headers did not come within {self._limits.header_s:g} s"
        self._refuse(Problem(408, "timeout_error", message, code="header_timeout"))

    def _refuse(self, problem: Problem) -> None:
        """Answer without the application, and close."""
        if not self._answered:  # an earlier request of this connection is being answered: nothing may come between
            self.transport.abort()
            return
        body = problem.encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[problem.status] + head + body)
        self.transport.close()


class _OneProtocolParser(httptools.HttpRequestParser):
    """A parser for which a connection stays HTTP/1.1, as RFC 9110, 7.8 allows: an offer to change it is not there.

    llhttp takes the body of such a request for bytes of the other protocol. Its headers are parsed again without the offer,
    and then its body after them; nothing in them is new to the parser, so nothing gets past its checks.
    """

    def __init__(self, protocol: GuardedProtocol) -> None:
        super().__init__(protocol)
        self._protocol = protocol
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's

    def feed_data(self, data: Any) -> None:
        """Parse what came."""
        rest = bytes(data)
        while rest:
            try:
                super().feed_data(rest)
            except httptools.HttpParserUpgrade as offer:
                if not self._protocol.upgrade_offered:  # CONNECT
                    raise
                rest = rest[offer.args[0] :]
                super().feed_data(self._protocol.head_without_offer())
            else:
                return
