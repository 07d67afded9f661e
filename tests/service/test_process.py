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

from radixkv.errors import ConfigError
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


@pytest.mark.model
def test_the_socket_answers_while_the_model_loads_and_a_drain_lets_requests_finish(serving):
    with serving("--num-pages", "64") as server:
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
        with stream(server, 60) as lines:
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining: 1 running")
            rest = [line for line in lines if line]
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
