"""What is not let in, and what a hostile client gets."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

pytestmark = pytest.mark.model

ADMIN_ROUTES = [("GET", "/flush_cache"), ("POST", "/flush_cache"), ("POST", "/reset_prefix_cache")]


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def head(server, path="/v1/completions", *lines):
    start = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Authorization: Bearer alice-key-1"]
    return "\r\n".join([*start, "Content-Type: application/json", *lines, "", ""]).encode()


def read_all(sock):
    """Everything until the server closes."""
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def status_of(data):
    return int(data.split(b" ", 2)[1])


def running(server):
    """Requests that run or wait, as the server counts them."""
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_"))


def until_idle(server):
    """Every look takes a request's time: no clock, and no more looks than a long answer has tokens."""
    return any(running(server) == 0 for _ in range(2000))


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "", "wrong", "alice-key-", "alice", "alice=alice-key-1", "the-admin-token"])
def test_nobody_without_a_key_is_let_in(server, key):
    with server.client(key) as client:
        for path in ("/v1/models", "/tokenize", "/v1/chat/completions", "/nowhere"):
            response = client.request("GET", path)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"


def test_both_headers_carry_a_key(server):
    with server.client(None) as client:
        assert client.get("/v1/models", headers={"x-api-key": "bob-key-1"}).status_code == 200
        assert client.get("/v1/models", headers={"authorization": "bearer bob-key-1"}).status_code == 200


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_admin_routes_need_the_admin_token(http, admin, method, path):
    refused = http.request(method, path)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_admin_token")
    assert admin.request(method, path).json()["success"] is True


def test_a_flush_forgets_what_was_cached(http, admin):
    ask = {"prompt": "flush " * 40, "max_tokens": 1}
    http.post("/v1/completions", json=ask)
    assert int(http.post("/v1/completions", json=ask).headers["x-radixkv-cached-tokens"]) > 0
    assert admin.post("/flush_cache").json() == {"success": True, "pages_left": 0}
    assert http.post("/v1/completions", json=ask).headers["x-radixkv-cached-tokens"] == "0"


def test_health_version_and_metrics_are_open(server):
    with server.client(None) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"ready": True, "status": "ok"}
        assert set(client.get("/version").json()) == {"version"}
        assert client.get("/metrics").status_code == 200


def test_another_host_is_refused_on_loopback(http):
    for host in ("evil.example", "127.0.0.1.evil.example:80", ""):
        assert http.get("/v1/models", headers={"host": host}).status_code == 421
        assert http.get("/metrics", headers={"host": host}).status_code == 421
        for path in ("/health", "/ready", "/version"):
            assert http.get(path, headers={"host": host}).status_code == 200
    assert http.get("/v1/models", headers={"host": "LOCALHOST:1"}).status_code == 200


def test_no_key_and_no_prompt_is_logged(server, http):
    http.post("/v1/completions", json={"prompt": "a secret sentence", "max_tokens": 1}, headers={"x-request-id": "seen-1"})
    line = server.wait_for("id=seen-1 ")
    assert "tenant=alice" in line
    assert "status=200" in line
    for secret in ("alice-key-1", "bob-key-1", "the-admin-token", "secret sentence", "Bearer"):
        assert secret not in server.log


def test_an_id_that_is_no_plain_word_is_not_taken_over(http):
    assert http.get("/v1/models", headers={"x-request-id": "my.id-1"}).headers["x-request-id"] == "my.id-1"
    assert http.get("/v1/models", headers={"x-request-id": "a b=c"}).headers["x-request-id"].startswith("req-")


# -- bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"null", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"\xff\xfe", 400),
        (b'{"prompt": "x", "max_tokens": NaN}', 400),
        (b'{"prompt": "x", "temperature": Infinity}', 400),
        (b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}", 400),
        (b"[" * 100_000, 400),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, 400),
        (b'{"prompt": "\\ud800", "echo": true, "max_tokens": 1}', 200),
        (b'{"prompt": "x", "max_tokens": 1, "\\ud800": 1}', 400),
        (b'{"model": "\\ud800", "prompt": "x"}', 404),
        (b'{"prompt": "x", "max_tokens": 1, "cache_salt": "\\u0000\\u00e9"}', 200),
        (b'{"prompt": "\\u0000", "max_tokens": 1, "stop": "\\u0000"}', 200),
    ],
)
def test_a_strange_body_is_an_answer_or_a_400_never_a_500(http, body, status):
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert status == 200 or response.json()["error"]["message"]


def deep_schema():
    deep: dict = {}
    for _ in range(400):
        deep = {"type": "object", "properties": {"a": deep}}
    return deep


def test_deep_tools_are_an_answer_or_a_400(http):
    tool = {"type": "function", "function": {"name": "f", "parameters": deep_schema()}}
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "tools": [tool]}
    assert http.post("/v1/chat/completions", json=body).status_code in (200, 400)
    form = {"type": "json_schema", "json_schema": {"name": "deep", "schema": deep_schema()}}
    response = http.post("/v1/chat/completions", json={**body, "tools": [], "response_format": form})
    assert response.status_code == 400 and "enforced" in response.json()["error"]["message"]


def test_a_body_that_is_not_json_by_its_type_is_refused(http):
    body = json.dumps({"prompt": "x", "max_tokens": 1})
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        headers = {"content-type": kind} if kind else {}
        assert http.post("/v1/completions", content=body, headers=headers).status_code == 415


def test_a_large_body_is_refused_whether_it_says_its_length_or_not(http):
    body = b'{"prompt": "' + b"x" * 400_000 + b'"}'
    headers = {"content-type": "application/json"}
    for content in (body, iter([body[:200_000], body[200_000:]])):
        response = http.post("/v1/completions", content=content, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_an_unknown_route_or_method_has_the_apis_form(http):
    assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert http.get("/v1/completions").json()["error"]["code"] == "method_not_allowed"


# -- sockets -----------------------------------------------------------------------------------------------------------


def test_a_body_that_stops_coming_ends_with_408(server):
    with connect(server) as sock:
        sock.sendall(head(server, "/v1/completions", "Content-Length: 100") + b'{"prompt"')
        assert status_of(read_all(sock)) == 408


def test_headers_that_do_not_end_are_answered_with_408_and_silence_is_closed(server):
    with connect(server) as slow, connect(server) as silent, connect(server) as blank:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        blank.sendall(b"\r\n")
        assert status_of(read_all(slow)) == 408
        assert read_all(silent) == b""
        assert read_all(blank) == b""


def send_until_cut_off(sock, data, times):
    """Send again and again; whether the other side gave up on us."""
    try:
        for _ in range(times):
            sock.sendall(data)
    except (ConnectionError, TimeoutError):
        return True
    return False


def test_headers_without_end_are_cut_off(server):
    with connect(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: ")
        assert send_until_cut_off(sock, b"a" * 65536, 256)


def test_what_is_not_http_is_a_400(server):
    with connect(server) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
        assert status_of(read_all(sock)) == 400


def test_two_lengths_are_no_way_to_smuggle_a_request(server):
    with connect(server) as sock:
        lines = ("Content-Length: 5", "Transfer-Encoding: chunked")
        sock.sendall(head(server, "/v1/completions", *lines) + b"0\r\n\r\nGET /flush_cache HTTP/1.1\r\n\r\n")
        assert status_of(read_all(sock)) == 400


OFFERS = [
    ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAA"),
    ("Upgrade: websocket, h2c", "upgrade: h2c", "connection: upgrade"),
]


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("cuts", [(), (20,), (-4,), (-1,), (-30, -2, None)])
def test_an_offer_of_another_protocol_is_not_taken_up_and_no_byte_is_lost(server, offer, chunked, cuts):
    data = b'{"prompt": "hello"}'
    body = b"7\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (data[:7], len(data) - 7, data[7:]) if chunked else data
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(data)}"
    top = head(server, "/tokenize", *offer, framing)
    ends = [*(len(top) if cut is None else cut % len(top) for cut in cuts), len(top) + len(body)]
    with connect(server) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, end in zip([0, *ends], ends, strict=False):
            sock.sendall((top + body)[start:end])
            running(server)  # an answer on another connection: the piece before has been read by now
        sock.sendall((top + body) * 2 + head(server, "/tokenize", "Connection: close", "Content-Length: 0"))
        answers = read_all(sock)
    assert answers.count(b"HTTP/1.1 200 OK") == 3
    assert answers.count(b"HTTP/1.1 400") == 1
    assert answers.count(b'"tokens":') == 3


def test_connect_is_no_way_around(server):
    with connect(server) as sock:
        sock.sendall(b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n")
        assert status_of(sock.recv(65536)) >= 400


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(server, http, stream):
    body = {"prompt": "go on and on", "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    data = json.dumps(body).encode()
    with connect(server) as sock:
        sock.sendall(head(server, "/v1/completions", f"Content-Length: {len(data)}", f"X-Request-Id: gone-{stream}") + data)
        if stream:
            assert sock.recv(1)
        else:
            while running(server) == 0:
                pass
    assert "status=499" in server.wait_for(f"id=gone-{stream} ")
    assert until_idle(server)


def test_a_client_that_does_not_read_is_cut_off(server):
    text = "a b c d " * 30_000
    data = json.dumps({"prompt": text}).encode()
    request = head(server, "/tokenize", f"Content-Length: {len(data)}") + data
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(60)
        sock.connect(("127.0.0.1", server.port))
        assert send_until_cut_off(sock, request, 200)  # answers pile up until the server gives up on us


def test_the_server_is_well_after_all_this(server, http):
    assert until_idle(server)
    assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    with pytest.raises(httpx.HTTPStatusError):
        http.get("/nowhere").raise_for_status()
