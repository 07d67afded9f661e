"""The lines of a trace file, gzip or plain, with their numbers; and the checks of single values.

A file is read once, front to back, one line in memory at a time.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

from radixkv.replay.errors import TraceError

__all__ = ["MAX_REQUEST_TOKENS", "TraceLines"]

MAX_REQUEST_TOKENS = 2**27
"""More tokens than any request has: a longer one is a damaged number, and would cost memory to expand."""

_MAX_LINE_BYTES = 2**28
_MAX_SECONDS = 2.0**40
_GZIP = b"\x1f\x8b"
_REPORT_EVERY = 64  # lines


class TraceLines:
    """Iterates over the lines of `path` that are not blank; a context manager that closes the file.

    Args:
        path: a file, gzip or plain (told by its first bytes).
        on_bytes: called now and then with how many more bytes of the file were read; for a progress bar.

    Attributes:
        number: of the line last given out, from 1.
    """

    def __init__(self, path: Path, on_bytes: Callable[[int], None] | None = None) -> None:
        self.path = path
        self.number = 0
        self._on_bytes = on_bytes
        self._reported = 0
        try:
            self._raw = path.open("rb")  # closed with this object
            packed = self._raw.read(2) == _GZIP
            self._raw.seek(0)
        except OSError as error:
            raise TraceError(str(path), 0, "", f"cannot be opened ({error.strerror or error})") from None
        self._stream: BinaryIO = gzip.open(self._raw) if packed else self._raw  # type: ignore[assignment]  # noqa: SIM115

    def __enter__(self) -> TraceLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()
        self._raw.close()

    def __iter__(self) -> Iterator[str]:
        """Give out every line that is not blank.

        Raises:
            TraceError: a truncated or damaged gzip stream, bytes that are not UTF-8, an endless line.
        """
        while line := self._next():
            self.number += 1
            if self._on_bytes is not None and self.number % _REPORT_EVERY == 0:
                self._report(self._on_bytes)
            try:
                text = line.decode("utf-8-sig" if self.number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                self.fail("", f"is not UTF-8 text ({error.reason} at byte {error.start})")
            if not text.isspace():
                yield text
        if self._on_bytes is not None:
            self._report(self._on_bytes)

    def _next(self) -> bytes:
        try:
            line = self._stream.readline(_MAX_LINE_BYTES)
        except (EOFError, OSError, zlib.error) as error:
            self.number += 1
            reason = "the gzip stream ends early" if isinstance(error, EOFError) else f"cannot be read ({error})"
            self.fail("", f"{reason}; copy the file again")
        if len(line) == _MAX_LINE_BYTES:
            self.number += 1
            self.fail("", f"is longer than {_MAX_LINE_BYTES - 1} bytes")
        return line

    def _report(self, on_bytes: Callable[[int], None]) -> None:
        at = self._raw.tell()
        on_bytes(at - self._reported)
        self._reported = at

    def fail(self, field: str, reason: str) -> NoReturn:
        """Raise a TraceError about `field` of the current line."""
        raise TraceError(str(self.path), self.number, field, reason) from None

    def parse(self, text: str) -> Any:
        """Read one line as JSON, refusing NaN, infinities and a field that is given twice."""

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            record = dict(pairs)
            if len(record) != len(pairs):
                names = [name for name, _ in pairs]
                self.fail(next(name for name in names if names.count(name) > 1), "is given twice")
            return record

        try:
            return json.loads(text, object_pairs_hook=unique, parse_constant=self._refuse)
        except TraceError:
            raise
        except json.JSONDecodeError as error:
            self.fail("", f"is not JSON ({error.msg} at column {error.colno})")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
            self.fail("", f"is not usable JSON ({error})")

    def _refuse(self, name: str) -> NoReturn:
        self.fail("", f"{name} is not a number")

    def integer(self, field: str, value: object, low: int = 0, high: int = MAX_REQUEST_TOKENS) -> int:
        """`value`, which must be an integer in low..high."""
        if type(value) is not int:
            self.fail(field, f"expected an integer, got {_shown(value)}")
        if not low <= value <= high:
            self.fail(field, f"expected {low} to {high}, got {_shown(value)}")
        return value

    def seconds(self, field: str, value: object, scale: float, not_before: float) -> float:
        """`value` x `scale`, a time that is not before that of the line above."""
        if type(value) is not int and type(value) is not float:
            self.fail(field, f"expected a number, got {_shown(value)}")
        time_s = float(max(-1, min(value, 2**64))) * scale
        if not 0 <= time_s <= _MAX_SECONDS:
            self.fail(field, f"expected a time from 0 to 2**40 s, got {_shown(value)}")
        if time_s < not_before:
            self.fail(field, f"{_shown(value)} is earlier than the request before it; sort the trace by time")
        return time_s


def _shown(value: object) -> str:
    """`value` for a message: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
