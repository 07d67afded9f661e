"""The terminal's side of the server: the client, `chat --url` and `top`, as processes of their own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from contextlib import closing, contextmanager

import pytest

from radixkv_client import ApiError, Client
from tests.service.conftest import ADMIN, KEYS

pytestmark = pytest.mark.model

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Screen:
    """A process, and everything it wrote so far."""

    def __init__(self, process, stream, write):
        self.process = process
        self.write = write
        self.text = ""
        self.ended = False
        self.news = threading.Condition()
        self.thread = threading.Thread(target=self._read, args=(stream,))
        self.thread.start()

    def _read(self, stream):
        while True:
            try:
                data = os.read(stream, 65536)
            except OSError:  # what a terminal's other end raises where a pipe's says it has ended
                data = b""
            with self.news:
                self.text += _ANSI.sub("", data.decode("utf-8", "replace"))
                self.ended = not data
                self.news.notify_all()
            if not data:
                return

    def wait_for(self, pattern, start=0):
        """Where the first match ends, from `start` on, once it is there."""
        with self.news:
            self.news.wait_for(lambda: re.search(pattern, self.text[start:]) or self.ended, 60)
            found = re.search(pattern, self.text[start:])
            assert found, f"no {pattern!r} in {self.text[start:]!r}"
            return start + found.end()

    def type(self, line):
        os.write(self.write, line.encode() + b"\n")

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def leave(self):
        return self.process.wait(60)


@contextmanager
def running(*command, terminal=False):
    """`radixkv ...` with a pipe or a terminal of 100 x 30 around it."""
    ours, theirs = pty.openpty() if terminal else (None, None)
    if terminal:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "radixkv", *command],
        stdin=theirs if terminal else subprocess.PIPE,
        stdout=theirs if terminal else subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TERM": "xterm", "RADIXKV_API_KEY": KEYS["alice"]},
    )
    if terminal:
        os.close(theirs)
    screen = Screen(process, ours or process.stdout.fileno(), ours or process.stdin.fileno())
    try:
        yield screen
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        screen.thread.join()
        if terminal:
            os.close(ours)
        else:
            process.stdin.close()
            process.stdout.close()


class Relay:
    """A port that leads to the server while it is open, and to nothing while it is closed."""

    def __init__(self, port):
        self.target = ("127.0.0.1", port)
        self.port = 0
        self.listener = None
        self.sockets = []
        self.threads = []
        self.open()

    def open(self):
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        self._start(self._accept, self.listener)

    def _start(self, act, *arguments):
        self.threads.append(threading.Thread(target=act, args=arguments))
        self.threads[-1].start()

    def _accept(self, listener):
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.target)
            self.sockets += [near, far]
            self._start(self._pump, near, far)
            self._start(self._pump, far, near)

    def _pump(self, source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other direction, or close(), was first

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.threads[0].join()
        for one in self.sockets:
            with closing(one):
                if one.fileno() >= 0 and one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    _shut(one)
        for thread in self.threads:
            thread.join()
        self.sockets.clear()
        self.threads.clear()


def _shut(one):
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it was closed from the other end


@pytest.fixture
def client(server):
    with Client(server.url, KEYS["alice"]) as client:
        yield client


def test_the_client_streams_an_answer_and_its_usage_and_finds_it_cached_the_second_time(client):
    fields = {"temperature": 0, "max_tokens": 12, "cache_salt": "terminal"}
    first, again = (list(client.chat(CAPITAL, **fields)) for _ in range(2))
    assert "".join(chunk.text for chunk in first) == "The capital of France is Paris."
    assert first[-1].usage.cached_tokens == 0
    usage = again[-1].usage
    kept = (usage.prompt_tokens + usage.completion_tokens - 1) // 16 * 16  # whole pages; the last token has no KV
    assert usage.cached_tokens == min(kept, usage.prompt_tokens - 1) > 0
    assert [chunk.text for chunk in again] == [chunk.text for chunk in first]
    (whole,) = client.chat(CAPITAL, stream=False, **fields)
    assert (whole.text, whole.finish_reason, whole.usage.completion_tokens) == ("The capital of France is Paris.", "stop", 8)


def test_the_client_knows_names_health_and_counts(client):
    assert [model.id for model in client.models()] == ["smollm2"]
    assert client.models()[0].max_model_len > 1000
    assert client.health().ready
    before = client.metrics()
    list(client.chat(CAPITAL, max_tokens=2))
    after = client.metrics()
    assert after.total("vllm:generation_tokens_total") == before.total("vllm:generation_tokens_total") + 2
    asked = after.histogram("vllm:time_to_first_token_seconds").since(before.histogram("vllm:time_to_first_token_seconds"))
    assert asked.count == 1


def test_a_refusal_is_an_error_with_the_servers_words(server, client):
    with Client(server.url, "no-such-key") as stranger, pytest.raises(ApiError) as caught:
        list(stranger.chat(CAPITAL))
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    with pytest.raises(ApiError, match="nothing-here") as caught:
        list(client.chat(CAPITAL, model="nothing-here"))
    assert caught.value.status == 404


def test_a_chat_with_a_server_remembers_rewinds_and_starts_anew(server):
    with running("chat", "--url", server.url, "--max-tokens", "12") as screen:
        at = screen.wait_for("smollm2 at http")
        screen.type("What is the capital of France?")
        at = screen.wait_for(r"The capital of France is Paris\.\s+prompt 37 tokens: \d+ skipped, \d+ computed; first", at)
        screen.type("And of Spain?")
        found = screen.wait_for(r"prompt \d+ tokens: \d+ skipped, \d+ computed", at)
        prompt, skipped = map(int, re.search(r"prompt (\d+) tokens: (\d+) skipped", screen.text[at:found]).groups())
        assert prompt > 50
        assert skipped >= 44 - 16  # the first turn, up to the last page's end
        screen.type("/rewind x")
        at = screen.wait_for("takes a number", found)
        screen.type("/rewind")
        at = screen.wait_for("1 turns left", at)
        screen.type("/system You are a pirate.")
        at = screen.wait_for("a new conversation", at)
        screen.type("/rewind 9")
        at = screen.wait_for("0 turns left", at)
        screen.type("/help")
        screen.wait_for("start anew", at)
        screen.type("/exit")
        assert screen.leave() == 0


def test_an_interrupt_ends_the_answer_at_the_server_and_the_chat_goes_on(server):
    with running("chat", "--url", server.url, "--max-tokens", "400", terminal=True) as screen:
        at = screen.wait_for(r"stops an answer\s+> ")
        seen = len(server.lines)
        screen.type("Write a very long story about rain.")
        at = screen.wait_for(r"story about rain\.\s+\w+ \w+", at)
        screen.interrupt()
        at = screen.wait_for("stopped; this turn is undone", at)
        screen.type("/rewind")
        at = screen.wait_for("0 turns left", at)
        screen.type("/exit")
        assert screen.leave() == 0
    with server.seen:
        assert server.seen.wait_for(lambda: any("status=499" in line for line in server.lines[seen:]), 60), server.log


def test_an_interrupt_ends_an_answer_computed_here_and_the_chat_goes_on(smollm2):
    with running("chat", "--max-tokens", "400", terminal=True) as screen:
        at = screen.wait_for(r"Ctrl-D leaves\s+> ")
        screen.type("Write a very long story about rain.")
        at = screen.wait_for(r"story about rain\.\s+\w+ \w+", at)
        screen.interrupt()
        at = screen.wait_for("stopped; this turn is undone", at)
        screen.type("/rewind 1")
        at = screen.wait_for("error: turns=1 is not possible", at)
        screen.type("/rewind 0")
        at = screen.wait_for("0 turns left", at)
        screen.type("/exit")
        assert screen.leave() == 0


def test_a_chat_with_nobody_is_one_line(server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with running("chat", "--url", f"http://127.0.0.1:{port}") as screen:
        screen.wait_for(f"error: no answer from http://127.0.0.1:{port}")
        assert screen.leave() == 1
    assert "Traceback" not in screen.text
    with running("chat", "--url", server.url, "--exact") as screen:
        screen.wait_for("the server's to set")
        assert screen.leave() == 1


def test_top_in_a_pipe_prints_one_interval_and_leaves(server, client):
    list(client.chat(CAPITAL, max_tokens=2))
    with running("top", "--url", server.url, "--interval", "0.1", "--api-key", ADMIN) as screen:
        assert screen.leave() == 0
    assert re.search(r"hit rate\s+now -\s+in all \d", screen.text)
    assert re.search(r"requests\s+0 running\s+0 waiting\s+0\.0/s ended", screen.text)
    assert re.search(r"of 256\s+pages", screen.text)


def test_live_top_shows_requests_says_when_the_server_is_gone_and_comes_back(server, client):
    relay = Relay(server.port)
    try:
        with running("top", "--url", f"http://127.0.0.1:{relay.port}", "--interval", "0.1", terminal=True) as screen:
            at = screen.wait_for(r"now -\s+in all")
            list(client.chat(CAPITAL, max_tokens=2))
            at = screen.wait_for(r"hit rate\s+now \d+\.\d %\s+in all", at)
            relay.close()
            at = screen.wait_for("no answer from", at)
            relay.open()
            at = screen.wait_for(r"radixkv top http[^\n]+smollm2\s+requests", at)
            screen.interrupt()
            assert screen.leave() == 0
    finally:
        relay.close()
    assert "Traceback" not in screen.text
