"""A real server process, started for a benchmark and ended after it."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition, Thread

_STARTUP_S = 180.0
_DRAIN_S = 20.0


@dataclass
class ServerProcess:
    """A server, and the last lines it wrote."""

    process: subprocess.Popen[str]
    admin_token: str
    url: str = ""
    ready: bool = False
    ended: bool = False
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=50))
    news: Condition = field(default_factory=Condition)

    def read(self) -> None:
        """Follow its log, until it ends."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self.news:
                self.lines.append(line)
                if found := re.search(r"listening on (http://\S+)", line):
                    self.url = found[1]
                self.ready = self.ready or " ready: " in line
                self.news.notify_all()
        with self.news:
            self.ended = True
            self.news.notify_all()

    def wait_until_ready(self) -> None:
        """Wait for the model.

        Raises:
            RuntimeError: it ended, or took too long.
        """
        with self.news:
            self.news.wait_for(lambda: self.ready or self.ended, _STARTUP_S)
            if not self.ready:
                raise RuntimeError("the server did not start:\n" + "".join(self.lines))


@contextmanager
def serving(model: str, options: Sequence[str]) -> Iterator[ServerProcess]:
    """`radixkv serve` with these options, ready; ended at the end."""
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "radixkv", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "RADIXKV_ADMIN_TOKEN": token})
    server = ServerProcess(process, token)
    reader = Thread(target=server.read)
    reader.start()
    try:
        server.wait_until_ready()
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_DRAIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        assert process.stderr is not None
        process.stderr.close()
