"""The life of the process: loading, draining, failing, and what it says of bad settings."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest

from radixkv.errors import ConfigError, SessionTooLong, TooManySessions
from radixkv_service.auth import Keyring, cache_salt_of
from radixkv_service.errors import ProblemError
from radixkv_service.service import Service
from radixkv_service.settings import ServiceSettings, load_settings

BODY = {"prompt": "go on", "ignore_eos": True, "stream": True, "temperature": 0}


def run(*options, **environment):
    command = [sys.executable, "-m", "radixkv", "serve", *options]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120, check=False
    )


@contextmanager
def stream(server, max_tokens):
    """The lines of a streamed completion, whose first event was read."""
    body = {**BODY, "max_tokens": max_tokens}
    with server.client(None) as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


@contextmanager
def half_a_body(server):
    """A connection on which a request's body has begun, and does not go on."""
    head = "POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 99"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall("\r\n".join([*head, "", "{"]).encode())
        yield sock


@pytest.mark.model
def test_the_socket_answers_while_the_model_loads_and_a_drain_lets_whole_requests_finish(serving):
    with serving("--num-pages", "64", "--drain-timeout", "90") as server:
        server.wait_for("listening")
        with server.client(None) as client:
            assert client.get("/health").json() == {"status": "loading"}
            for path in ("/ready", "/v1/models"):
                early = client.get(path)
                assert early.status_code == 503
                assert int(early.headers["retry-after"]) > 0
            assert client.get("/v1/models").json()["error"]["code"] == "loading"
        server.wait_for("INFO ready")
        assert "admin token (made for this run" in server.log
        with half_a_body(server) as sock, stream(server, 60) as lines:
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining: 1 running")
            refused = b"".join(iter(lambda: sock.recv(65536), b""))  # long before body_timeout and drain_timeout
            rest = [line for line in lines if line]
        assert refused.startswith(b"HTTP/1.1 503")
        assert b"connection: close" in refused and b'"draining"' in refused
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(60) == 0, server.log
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
        assert "Traceback" not in server.log


@pytest.mark.model
def test_a_full_queue_is_a_429_and_what_does_not_drain_in_time_ends_with_an_error_event(serving):
    with serving("--num-pages", "256", "--drain-timeout", "0.2", "--max-running", "1", "--max-waiting", "1") as server:
        server.wait_for("INFO ready")
        with stream(server, 4000) as lines, server.client(None) as client:
            refused = client.post("/v1/completions", json={"prompt": "x", "n": 4, "max_tokens": 1})
            server.process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        assert rest[-2] == "event: error"
        assert json.loads(rest[-1][6:])["error"]["code"] == "draining"
        assert server.process.wait(60) == 0, server.log
        assert "Traceback" not in server.log


def test_a_server_that_still_loads_ends_at_once_with_exit_code_0(serving):
    with serving() as server:
        server.wait_for("listening")
        assert server.stop() == 0


def test_a_model_that_cannot_be_loaded_ends_the_process_with_1():
    done = run("./no-such-model", "--port", "0")
    assert done.returncode == 1
    assert "no-such-model" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("smollm2", "--port", str(port))
    assert done.returncode == 1
    assert f"127.0.0.1:{port} cannot be listened on" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "environment", "name"),
    [
        (["--drain-timeout", "-1"], {}, "drain_timeout"),
        (["--page-size", "17"], {}, "page_size"),
        ([], {"RADIXKV_POLICY": "magic"}, "policy"),
    ],
)
def test_a_bad_setting_is_named_on_one_line(options, environment, name):
    done = run("smollm2", "--port", "0", *options, **environment)
    assert done.returncode == 1
    assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_come_from_the_environment_and_the_command_line_wins(monkeypatch, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# people\nalice=one\n\ntwo\n")
    monkeypatch.setenv("RADIXKV_API_KEYS", "bob=three, four")
    monkeypatch.setenv("RADIXKV_PORT", "9000")
    monkeypatch.setenv("RADIXKV_ENABLE_PREFIX_CACHING", "false")
    settings = load_settings({"port": 9001, "host": None, "api_keys_file": keys})
    assert (settings.port, settings.host) == (9001, "127.0.0.1")
    assert settings.engine_config().cache is False
    assert "three" not in repr(settings)

    async def tenants():
        return Service(settings).keys

    ring = asyncio.run(tenants())
    assert ring.tenants[:2] == ["alice", "bob"]
    assert ring.tenant("three") == "bob"
    assert ring.tenant("two").startswith("key-")
    assert ring.tenant("bob=three") is None


@pytest.mark.parametrize("text", ["", "\n", "# alice=one\n", "  # none\n\n"])
def test_a_file_of_keys_without_one_does_not_let_everybody_in(tmp_path, text):
    keys = tmp_path / "keys"
    keys.write_text(text)

    async def make():
        Service(load_settings({"api_keys_file": keys, "api_keys": ["alice=one"]}))

    with pytest.raises(ConfigError, match=r"api_keys_file=.* at least one key"):
        asyncio.run(make())


@pytest.mark.parametrize("text", ["", ",", " , ,", "[]"])
def test_keys_that_are_set_and_are_none_do_not_let_everybody_in(monkeypatch, text):
    monkeypatch.setenv("RADIXKV_API_KEYS", text)
    with pytest.raises(ConfigError, match=r"api_keys.*holds no key"):
        load_settings({})


def test_one_key_has_one_name_and_a_name_may_have_several_keys():
    assert Keyring(["a=one", "a=two", "a=one", "b=three"]).tenants == ["a", "b"]
    with pytest.raises(ConfigError, match="api_keys='alice, bob'") as error:
        Keyring(["alice=s3cret", "carol=other", "bob=s3cret"])
    assert "s3cret" not in str(error.value)


def test_a_tenant_has_a_quarter_of_what_all_may_open_and_a_server_with_one_gives_it_all():
    async def share(*keys):
        return Service(load_settings({"api_keys": list(keys)}))._share(8)

    assert [asyncio.run(share(*keys)) for keys in ((), ("a=1", "a=2"), ("a=1", "b=2"))] == [8, 8, 2]


@pytest.mark.model
def test_a_tenant_has_only_so_many_sessions_and_repositories_whatever_its_salts(smollm2, tmp_path):
    (tmp_path / "hello.py").write_text("hello = 1\n")
    given = {"api_keys": ["a=1", "b=2"], "max_sessions": 4, "max_repositories": 4, "repository_root": [tmp_path]}

    async def live():
        service = Service(load_settings({**given, "model": "smollm2", "dtype": "float32", "num_pages": 64}))
        service.start()
        await service.settled.wait()
        sessions, repositories = service.sessions, service.repositories
        for tenant in ("a", "b"):
            mine = sessions.open(cache_salt_of(tenant, "one"))
            with pytest.raises(TooManySessions, match="the limit is 1"):
                sessions.open(cache_salt_of(tenant, "two"))
            text = {"role": "user", "content": "x" * 10_000_000}  # the pool holds a thousand tokens
            with pytest.raises(SessionTooLong):
                sessions.append(mine, cache_salt_of(tenant, "one"), [text])
            opened = repositories.open(service.engine, tenant, str(tmp_path))
            with pytest.raises(ProblemError, match="you have 1 repositories open and the limit is 1"):
                repositories.open(service.engine, tenant, str(tmp_path))
            repositories.remove(opened.id, tenant)
            repositories.open(service.engine, tenant, str(tmp_path))
        await service.close()

    asyncio.run(live())


@pytest.mark.parametrize("given", [{"port": 99999}, {"api_keys": ["a", ""]}, {"admin_token": "short"}, {"nonsense": 1}])
def test_a_bad_value_names_its_setting_and_is_not_repeated(given):
    async def make():
        Service(load_settings(given))

    with pytest.raises(ConfigError) as error:
        asyncio.run(make())
    assert next(iter(given)).rstrip("s") in str(error.value)
    assert "short" not in str(error.value)


@pytest.mark.model
def test_an_engine_whose_thread_ends_fails_the_server(smollm2):
    def end(_):
        raise SystemExit

    async def live():
        failed = asyncio.Event()
        service = Service(ServiceSettings(model="smollm2", dtype="float32", num_pages=64), on_failure=failed.set)
        service.start()
        await service.settled.wait()
        assert (service.status, service.unavailable()) == ("ok", None)
        service.front._send(end)
        await failed.wait()
        problem = service.unavailable()
        await service.close()
        return service.status, problem.status

    assert asyncio.run(live()) == ("failed", 503)


DYING = """
import asyncio, contextlib, logging, sys
from radixkv.errors import EngineClosed
from radixkv_service import server
from radixkv_service.service import Service
from radixkv_service.settings import ServiceSettings

class Dying(Service):
    def _loaded(self, *loaded):
        super()._loaded(*loaded)
        self.death = asyncio.create_task(self.die())

    async def die(self):
        with contextlib.suppress(EngineClosed):
            await self.front.call(lambda engine: sys.exit("the thread's own end"))

logging.basicConfig()
server.Service = Dying
sys.exit(server.serve_forever(ServiceSettings(model="smollm2", port=0, dtype="float32", num_pages=64)))
"""


@pytest.mark.model
def test_an_engine_whose_thread_ends_takes_the_process_with_it(smollm2):
    done = subprocess.run([sys.executable, "-c", DYING], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "the server ends with it" in done.stderr
