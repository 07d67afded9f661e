"""A server of one connection after another that sends exactly the bytes it is told to, cut where it is told to."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(*parts):
    """An event stream's bytes, each part a chunk of its own; no end."""
    return [HEAD, *(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)]


END = b"0\r\n\r\n"


def plain(status, body=b"", **headers):
    """A whole response."""
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return [("\r\n".join(lines) + "\r\n\r\n").encode() + body]


class RawServer:
    """Answers connection number n with answers[n]; `requests` holds what was asked."""

    def __init__(self, answers):
        self.answers = answers
        self.requests = []
        self.gone = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self):
        for answer in self.answers:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                self.requests.append(self._request(connection))
                for part in answer:
                    if part is WAIT_FOR_CLOSE:
                        connection.settimeout(30)
                        while connection.recv(4096):
                            pass
                        self.gone.set()
                    else:
                        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        connection.sendall(part)

    @staticmethod
    def _request(connection):
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
        while len(body) < length:
            body += connection.recv(65536)
        return head, body


WAIT_FOR_CLOSE = object()


@contextmanager
def answering(*answers):
    server = RawServer(answers)
    try:
        yield server
    finally:
        server.listener.shutdown(socket.SHUT_RDWR)
        server.listener.close()
        server.thread.join(30)
        assert not server.thread.is_alive()
