r"""Server-sent events out of bytes, however the network cut them.

    b"data: {\"a\"" │ b":1}\r" │ b"\n\r\ndata: x\n" │ ...   ──▶   Event("message", '{"a":1}'), ...

A line is decoded once it is whole, so a character that was cut in two is put together first. Lines end with \n, \r\n or \r.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from radixkv_client.errors import StreamBroken

__all__ = ["Event", "EventDecoder"]

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    Attributes:
        kind: its `event` field; "message" where it has none.
        data: its `data` lines, joined by line ends.
    """

    kind: str
    data: str


@final
class EventDecoder:
    r"""Takes bytes as they come, gives the events that are whole.

    Args:
        max_bytes: the longest event; a stream without any line end must not fill the memory.

    >>> decoder = EventDecoder()
    >>> list(decoder.feed(b": a comment\r\ndata: one\r"))
    []
    >>> list(decoder.feed(b"\ndata:two\r\n\r\n"))
    [Event(kind='message', data='one\ntwo')]
    """

    def __init__(self, max_bytes: int = 16 * 1024 * 1024) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()
        self._scanned = 0  # bytes of the rest that hold no line end
        self._after_cr = False  # the \n of a \r\n may come with the next bytes
        self._first = True
        self._kind = ""
        self._data: list[str] = []
        self._num_bytes = 0

    @property
    def unfinished(self) -> bool:
        """Whether an event has begun and not ended."""
        return bool(self._rest or self._data)

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that these bytes complete. Cost: O(bytes).

        Raises:
            StreamBroken: an event longer than may be, or bytes that are no UTF-8.
        """
        for line in self._lines(chunk):
            event = self._take(line)
            if event is not None:
                yield event

    def _lines(self, chunk: bytes) -> Iterator[bytes]:
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        self._rest += chunk
        while (end := self._line_end()) is not None:
            line = bytes(self._rest[:end])
            stop = end + 1
            if self._rest[end] == 13:
                self._after_cr = stop == len(self._rest)
                stop += self._rest[stop : stop + 1] == b"\n"
            del self._rest[:stop]
            self._scanned = 0
            if self._first:
                line, self._first = line.removeprefix(_BOM), False
            yield line
        self._scanned = len(self._rest)
        self._limit(len(self._rest))

    def _line_end(self) -> int | None:
        ends = [self._rest.find(mark, self._scanned) for mark in (b"\n", b"\r")]
        return min((end for end in ends if end >= 0), default=None)

    def _take(self, line: bytes) -> Event | None:
        """One line; an empty one ends an event."""
        if not line:
            kind, data = self._kind or "message", self._data
            self._kind, self._data, self._num_bytes = "", [], 0
            return Event(kind, "\n".join(data)) if data else None
        self._num_bytes += len(line)
        self._limit(0)
        try:
            name, _, value = line.decode("utf-8").partition(":")
        except UnicodeDecodeError as error:
            raise StreamBroken("it holds bytes that are no text") from error
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._kind = value
        return None  # comments, and fields that nobody here reads

    def _limit(self, more: int) -> None:
        if self._num_bytes + more > self._max_bytes:
            raise StreamBroken(f"an event is longer than {self._max_bytes} bytes")
