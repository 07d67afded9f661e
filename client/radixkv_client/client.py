"""The client: one server, its routes as methods.

    method ──▶ Call (what to send) ──▶ httpx ──▶ wire.py (what came back, as values)

What is sent and how answers are read knows nothing of httpx's two kinds of client; only `_send` and `_stream` do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from radixkv_client.errors import BadAnswer, BadUrl, ConnectionFailed, StreamBroken
from radixkv_client.metrics import Metrics, parse_metrics
from radixkv_client.retry import NO_RETRY, Retry, retry_after_s
from radixkv_client.sse import EventDecoder
from radixkv_client.wire import (
    ChatChunk,
    Health,
    Model,
    api_error,
    chat_chunk,
    health_of,
    models_of,
    stream_error,
    whole_chat,
)

__all__ = ["Client", "Message"]

Message = Mapping[str, Any]
"""A chat message: {"role": ..., "content": ...}."""

_CONNECT_S = 10.0
_DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class _Call:
    """A request, before anything is sent."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    retry: Retry = NO_RETRY


class Client:
    """A connection to one server.

    Args:
        base_url: its address; with or without the /v1 that OpenAI's clients want.
        api_key: a key, where the server wants one.
        timeout: seconds without a byte before the connection counts as broken; a long prompt takes its time.
        retry: when to ask again. A 429 or 503 says that nothing was begun, so every request of this client may be repeated.
        sleep: how to wait.

    Raises:
        BadUrl: no http or https URL.

    Thread safety: any thread may call anything.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout: float = 600.0,
        *,
        retry: Retry | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.base_url = _base(base_url)
        self._retry = retry if retry is not None else Retry()
        self._sleep = sleep
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Timeout(timeout, connect=min(timeout, _CONNECT_S))
        self._http = httpx.Client(base_url=self.base_url, headers=headers, timeout=limits)

    # -- routes -------------------------------------------------------------------------------------------------------

    def health(self) -> Health:
        """Where the server is in its life. A server that failed still says so; only none at all raises.

        Raises:
            ConnectionFailed: nobody answers. BadAnswer: somebody else does.
        """
        response = self._once(_Call("GET", "/health"))
        return health_of(self._at("/health"), response.content)

    def models(self) -> list[Model]:
        """The names under which the model is served, the one answers carry first.

        Raises:
            ClientError: as its name says.
        """
        response = self._send(_Call("GET", "/v1/models", retry=self._retry))
        return models_of(self._at("/v1/models"), response.content)

    def metrics(self) -> Metrics:
        """What the server counts; never waited for, since what is not there now is of no use later.

        Raises:
            ClientError: as its name says.
        """
        response = self._send(_Call("GET", "/metrics"))
        return parse_metrics(response.text, self._at("/metrics"))

    def chat(self, messages: Sequence[Message], stream: bool = True, **fields: Any) -> Generator[ChatChunk]:
        """Ask for the next answer of a conversation. Closing the generator ends the answer at the server.

        Args:
            messages: the conversation so far.
            stream: hand out what there is as it comes; else the whole answer is one chunk.
            fields: of the request: model, max_tokens, temperature, ...

        Yields:
            Chunks, the first one when the first token is there; the last one carries the usage.

        Raises:
            ApiError: refused, or failed on the way. StreamBroken: it ended early. ConnectionFailed: nobody answers.
            All when the first chunk is read, or later.
        """
        body: dict[str, Any] = {"messages": list(messages), **fields}
        if not stream:
            response = self._send(_Call("POST", "/v1/chat/completions", body, self._retry))
            yield whole_chat(self._at("/v1/chat/completions"), response.content)
            return
        body |= {"stream": True, "stream_options": {"include_usage": True, **fields.get("stream_options", {})}}
        with self._stream(_Call("POST", "/v1/chat/completions", body, self._retry)) as data:
            for one in data:
                yield chat_chunk(one)

    # -- sending ------------------------------------------------------------------------------------------------------

    def _send(self, call: _Call) -> httpx.Response:
        """Send and read the whole answer."""
        for num_tries in range(1, call.retry.max_retries + 2):
            response = self._once(call)
            if response.is_success:
                return response
            self._wait_or_raise(call, response, num_tries)
        raise AssertionError("the last try raises")

    def _once(self, call: _Call) -> httpx.Response:
        with self._reaching():
            return self._http.request(call.method, call.path, json=call.body)

    @contextmanager
    def _stream(self, call: _Call) -> Iterator[Iterator[str]]:
        """Send, and hand out the data of every event."""
        for num_tries in range(1, call.retry.max_retries + 2):
            with self._reaching():
                request = self._http.build_request(call.method, call.path, json=call.body)
                response = self._http.send(request, stream=True)
            try:
                if response.is_success:
                    yield self._data_of(response)
                    return
                with self._reaching():
                    response.read()
            finally:
                response.close()
            self._wait_or_raise(call, response, num_tries)

    def _data_of(self, response: httpx.Response) -> Iterator[str]:
        kind = response.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise BadAnswer(str(response.url), f"a stream of events was asked for, and {kind or 'nothing named'} came")
        decoder = EventDecoder()
        for chunk in _chunks(response):
            for event in decoder.feed(chunk):
                if event.kind == "error":
                    raise stream_error(event.data)
                if event.data == _DONE:
                    return
                yield event.data
        raise StreamBroken("the connection was closed before its end")

    def _wait_or_raise(self, call: _Call, response: httpx.Response, num_tries: int) -> None:
        asked_s = retry_after_s(response.headers.get("retry-after"))
        wait_s = call.retry.wait_s(num_tries, response.status_code, asked_s)
        if wait_s is None:
            raise api_error(response.status_code, response.content, asked_s)
        self._sleep(wait_s)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            raise ConnectionFailed(self.base_url, f"nothing came in time ({type(error).__name__})") from error
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise ConnectionFailed(self.base_url, str(error) or type(error).__name__) from error

    def _at(self, path: str) -> str:
        return self.base_url + path

    # -- life ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the connections. Safe to call twice."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.base_url!r})"


def _base(url: str) -> str:
    try:
        parsed = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise BadUrl(url) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise BadUrl(url)
    return str(parsed).rstrip("/").removesuffix("/v1").rstrip("/")


def _chunks(response: httpx.Response) -> Iterator[bytes]:
    """The bytes as they come; a connection that breaks is a broken stream."""
    try:
        yield from response.iter_bytes()
    except httpx.RequestError as error:
        raise StreamBroken(str(error) or type(error).__name__) from error
