"""One real server process for all tests of the service, and a way to start others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest

ADMIN = "the-admin-token"
KEYS = {"alice": "alice-key-1", "bob": "bob-key-1"}


@dataclass
class Server:
    """A server process, and what it wrote."""

    process: subprocess.Popen
    port: int = 0
    lines: list[str] = field(default_factory=list)
    seen: threading.Condition = field(default_factory=threading.Condition)
    ended: bool = False

    def read(self):
        for line in self.process.stderr:
            with self.seen:
                self.lines.append(line)
                if found := re.search(r"listening on http://[^ ]+:(\d+)", line):
                    self.port = int(found[1])
                self.seen.notify_all()
        with self.seen:
            self.ended = True
            self.seen.notify_all()

    def wait_for(self, pattern, timeout=60.0):
        """The first line that matches, whether it is there already or comes."""

        def found():
            return next((line for line in self.lines if re.search(pattern, line)), None)

        with self.seen:
            self.seen.wait_for(lambda: found() or self.ended, timeout)
            assert found(), f"no line like {pattern!r} in:\n{self.log}"
            return found()

    @property
    def log(self):
        return "".join(self.lines)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def client(self, key=KEYS["alice"], **settings):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **settings)

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture(scope="session")
def serving(smollm2):
    """Starts a server process with these options, as a context manager."""
    return _serving


@contextmanager
def _serving(*options, **environment):
    command = [sys.executable, "-m", "radixkv", "serve", "smollm2", "--port", "0", "--dtype", "float32", *options]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RADIXKV_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **environment},
    )
    server = Server(process)
    reader = threading.Thread(target=server.read)
    reader.start()
    try:
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


@pytest.fixture(scope="session")
def server(serving):
    """The server most tests talk to: two tenants, short patience with clients."""
    keys = [part for name, key in KEYS.items() for part in ("--api-key", f"{name}={key}")]
    limits = ("--body-timeout", "2", "--header-timeout", "2", "--max-body-bytes", "300000", "--write-timeout", "1")
    with serving(*keys, "--admin-token", ADMIN, "--num-pages", "256", *limits) as server:
        server.wait_for(r"\] ready:|INFO ready:")
        yield server
        assert server.process.poll() is None, server.log
        assert "Traceback" not in server.log, server.log


@pytest.fixture
def http(server):
    with server.client() as client:
        yield client


@pytest.fixture
def bob(server):
    with server.client(KEYS["bob"]) as client:
        yield client


@pytest.fixture
def admin(server):
    with server.client(ADMIN) as client:
        yield client


@pytest.fixture
def openai_client(server):
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS["alice"], max_retries=0, timeout=60) as client:
        yield client
