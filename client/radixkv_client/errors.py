"""What can go wrong between a program and the server.

    ClientError
    ├── BadUrl              the address is none
    ├── ConnectionFailed    no connection, or it broke before an answer
    ├── ApiError            the server refused, or failed; also in the middle of a stream
    ├── StreamBroken        a stream ended before its end, or is no stream of events
    └── BadAnswer           an answer that is not in the API's form

Each carries its facts as fields, so a caller never parses the text.
"""

from __future__ import annotations

__all__ = ["ApiError", "BadAnswer", "BadUrl", "ClientError", "ConnectionFailed", "StreamBroken"]


class ClientError(Exception):
    """Base of every error that this package raises on purpose."""


class BadUrl(ClientError, ValueError):
    """An address that is no http or https URL."""

    def __init__(self, url: str) -> None:
        super().__init__(f"{url!r} is no address of a server; write it as http://127.0.0.1:8100")
        self.url = url


class ConnectionFailed(ClientError):
    """The server could not be reached, or the connection broke before it had answered."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"no answer from {url}: {reason}; check that the server runs there (radixkv serve)")
        self.url = url
        self.reason = reason


class ApiError(ClientError):
    """The server said no.

    Attributes:
        status: of HTTP; 200 where the answer had begun already.
        type: its kind, in OpenAI's words ("invalid_request_error", ...); empty where it does not say.
        message: what the server says.
        code: a short name that programs compare; empty where there is none.
        retry_after_s: when to try again, if the server says so.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        code: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        where = "in the middle of its answer" if status == 200 else f"with {status}"
        super().__init__(f"the server ended the request {where}: {message}")
        self.status = status
        self.type = kind
        self.message = message
        self.code = code
        self.retry_after_s = retry_after_s


class StreamBroken(ClientError):
    """A streamed answer that did not come to its end; what came of it must not pass for the whole."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the streamed answer is not whole: {reason}; ask again (what was computed may be cached)")
        self.reason = reason


class BadAnswer(ClientError):
    """An answer in another form than the API's: there is something else at this address."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url} does not answer as a radixkv server does: {reason}; check the address")
        self.url = url
        self.reason = reason
