"""The client against servers that break, refuse, stall and lie, byte by byte."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, datetime

import pytest

from radixkv_client import (
    NO_RETRY,
    ApiError,
    BadAnswer,
    BadUrl,
    ChatChunk,
    Client,
    ConnectionFailed,
    Retry,
    StreamBroken,
    Usage,
)
from radixkv_client.retry import retry_after_s
from tests.client.wire import END, WAIT_FOR_CLOSE, answering, chunked, plain

MESSAGES = [{"role": "user", "content": "Hi"}]
ONE = b'data: {"choices":[{"index":0,"delta":{"content":"on\xc3\xa9"},"finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,"total_tokens":11,'
    b'"prompt_tokens_details":{"cached_tokens":8}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
REFUSED = json.dumps(
    {"error": {"message": "too many wait", "type": "rate_limit_error", "param": None, "code": "queue_full"}}
)


def chat(server, **settings):
    with Client(server.url, **settings) as client:
        return list(client.chat(MESSAGES))


def test_a_stream_cut_anywhere_is_the_same_answer():
    stream = b": hello\n\n" + ONE + LAST + USAGE + DONE
    parts = [stream[at : at + 7] for at in range(0, len(stream), 7)]
    with answering([*chunked(*parts), END]) as server:
        chunks = chat(server)
    assert chunks == [ChatChunk("on\u00e9"), ChatChunk("", "stop"), ChatChunk("", usage=Usage(9, 2, 8))]


def test_the_request_is_a_streamed_chat_with_usage_and_the_key():
    with answering([*chunked(DONE), END]) as server, Client(server.url + "/v1/", api_key="k") as client:
        assert list(client.chat(MESSAGES, max_tokens=3)) == []
        head, body = server.requests[0]
    assert head.startswith(b"POST /v1/chat/completions ")
    assert b"authorization: Bearer k" in head.replace(b"Authorization", b"authorization")
    assert json.loads(body) == {
        "messages": MESSAGES,
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_whole_answer_is_one_chunk():
    body = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"hi"},"finish_reason":"stop"}],"usage":null}'
    with answering(plain(200, body)) as server, Client(server.url) as client:
        assert list(client.chat(MESSAGES, stream=False)) == [ChatChunk("hi", "stop")]


@pytest.mark.parametrize(
    "answer",
    [
        [*chunked(ONE), END],  # closed properly, yet without [DONE]
        chunked(ONE),  # cut between chunks
        [*chunked(ONE), b"ff\r\ndata: {"],  # cut inside a chunk
        [*chunked(ONE, b"data: {not json\n\n"), END],
        [*chunked(ONE, b"data: [1]\n\n"), END],
        [*chunked(ONE, b'data: {"id":"x"}\n\n'), END],
        [*chunked(ONE, b"data: \xff\n\n"), END],
    ],
)
def test_a_broken_stream_never_passes_for_a_whole_answer(answer):
    seen = []
    with answering(answer) as server, Client(server.url) as client, pytest.raises(StreamBroken):
        seen.extend(chunk.text for chunk in client.chat(MESSAGES))
    assert seen in ([], ["on\u00e9"])


@pytest.mark.parametrize("kind", [b"event: error\n", b""])
def test_an_error_in_the_middle_is_the_servers_own(kind):
    parts = chunked(ONE, kind + b"data: " + REFUSED.encode() + b"\n\n")
    with answering([*parts, END]) as server, pytest.raises(ApiError) as caught:
        chat(server)
    error = caught.value
    assert (error.status, error.type, error.code, error.message) == (200, "rate_limit_error", "queue_full", "too many wait")


def test_closing_the_answer_closes_the_connection():
    with answering([*chunked(ONE), WAIT_FOR_CLOSE]) as server, Client(server.url) as client:
        with closing(client.chat(MESSAGES)) as chunks:
            assert next(chunks).text == "on\u00e9"
        assert server.gone.wait(30)


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_says_when_is_asked_again_then(status):
    waits = []
    busy = plain(status, REFUSED.encode(), retry_after="2")
    with answering(busy, busy, [*chunked(ONE, LAST, DONE), END]) as server:
        chunks = chat(server, sleep=waits.append)
    assert waits == [2.0, 2.0]
    assert chunks[0].text == "on\u00e9"


def test_a_server_that_stays_busy_is_an_error_that_says_when():
    waits = []
    with answering(*[plain(429, REFUSED.encode(), retry_after="1")] * 3) as server, pytest.raises(ApiError) as caught:
        chat(server, retry=Retry(max_retries=2), sleep=waits.append)
    assert waits == [1.0, 1.0]
    assert (caught.value.status, caught.value.retry_after_s, caught.value.code) == (429, 1.0, "queue_full")


@pytest.mark.parametrize(
    ("status", "headers", "retry"), [(503, {"retry_after": "3600"}, Retry()), (500, {}, Retry()), (429, {}, NO_RETRY)]
)
def test_what_is_not_worth_waiting_for_is_not_waited_for(status, headers, retry):
    waits = []
    with (
        answering(plain(status, b"<h1>no</h1>", **headers)) as server,
        Client(server.url, retry=retry, sleep=waits.append) as c,
        pytest.raises(ApiError, match="no") as caught,
    ):
        c.models()
    assert (waits, caught.value.status, caught.value.type) == ([], status, "")


def test_waits_double_where_the_server_does_not_say():
    retry = Retry(max_retries=3, max_wait_s=1.5)
    assert [retry.wait_s(n, 503, None) for n in (1, 2, 3, 4)] == [0.5, 1.0, None, None]


def test_retry_after_may_be_a_date():
    now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
    assert retry_after_s("Thu, 01 Jan 2026 12:00:07 GMT", now) == 7.0
    assert retry_after_s("Thu, 01 Jan 2026 11:00:00 GMT", now) == 0.0
    assert retry_after_s("inf", now) is None
    assert retry_after_s(None, now) is None


def test_nobody_there_is_said_with_the_address():
    with answering() as server:
        url = server.url
    with Client(url) as client, pytest.raises(ConnectionFailed) as caught:
        client.health()
    assert url in str(caught.value)


def test_silence_ends_with_the_timeout():
    with (
        answering([WAIT_FOR_CLOSE]) as server,
        Client(server.url, timeout=0.2) as client,
        pytest.raises(ConnectionFailed, match="in time"),
    ):
        client.models()


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"data":[1]}'])
def test_another_kind_of_server_is_told_apart(body):
    with answering(plain(200, body), plain(200, body), plain(200, body)) as server, Client(server.url) as client:
        with pytest.raises(BadAnswer, match="check the address"):
            client.models()
        with pytest.raises(BadAnswer, match="check the address"):
            client.health()
        with pytest.raises(BadAnswer, match="stream of events"):
            list(client.chat(MESSAGES))


def test_health_of_a_failed_server_is_an_answer():
    with answering(plain(503, b'{"status":"failed"}')) as server, Client(server.url) as client:
        assert client.health().status == "failed"


@pytest.mark.parametrize("url", ["localhost:8100", "", "http://", "ftp://x", "http://[::1"])
def test_what_is_no_address_is_refused_at_once(url):
    with pytest.raises(BadUrl, match="8100"):
        Client(url)


def test_an_address_may_end_as_openais_clients_write_it():
    with Client("http://h:1/v1/") as one, Client("http://h:1") as other:
        assert one.base_url == other.base_url == "http://h:1"
