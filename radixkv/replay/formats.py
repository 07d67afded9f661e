"""Public trace formats in, requests out; which format a file has is told by its first line.

    first line                            format          blocks of     times in
    {"format": "triedelta-1", ...}        triedelta-1     the header's  milliseconds
    {"chat_id": ..., "hash_ids": ...}     Qwen-Bailian    16 tokens     seconds
    {"timestamp": ..., "hash_ids": ...}   Mooncake        512 tokens    milliseconds

Files are gzip or plain and are read as a stream: memory grows with the number of distinct blocks (4 to 8 bytes each),
for triedelta-1 with the number of requests as well (16 bytes each), never with the length of the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import merge
from os import PathLike
from pathlib import Path

from radixkv.errors import ConfigError
from radixkv.replay.blocks import BlockIds, IdCounter
from radixkv.replay.errors import TraceError
from radixkv.replay.jsonl import MOONCAKE, QWEN, read_objects
from radixkv.replay.lines import TraceLines
from radixkv.replay.trace import TraceRequest
from radixkv.replay.triedelta import FORMAT, read_deltas

__all__ = ["TraceRequest", "read_trace", "read_traces"]

OnBytes = Callable[[int], None]


def read_trace(
    path: str | PathLike[str],
    *,
    counter: IdCounter | None = None,
    ids: BlockIds | None = None,
    block_tokens: int | None = None,
    on_bytes: OnBytes | None = None,
) -> Iterator[TraceRequest]:
    """Read one trace, lazily.

    Cost: about 50 ns a block id, nearly all of it JSON. Memory: see the module.

    Args:
        path: the file.
        counter: where block ids come from; traces with one counter have no id in common.
        ids: what maps block ids; traces with one of these share blocks. triedelta-1 has no ids to share.
        block_tokens: tokens in a block where the format has no header to say it; the format's usual number by default.
        on_bytes: called now and then with how many more bytes of the file were read.

    Raises:
        TraceError: a line cannot be read; names file, line and field. Raised when that line is reached.
    """
    counter = counter or IdCounter()
    with TraceLines(Path(path), on_bytes) as lines:
        rest = iter(lines)
        text = next(rest, None)
        if text is None:
            raise TraceError(str(path), 0, "", "the file is empty")
        first = lines.parse(text)
        if type(first) is not dict:
            lines.fail("", "neither a header nor a request; expected a JSON object")
        if "format" in first:
            if first["format"] != FORMAT:
                lines.fail("format", f"unknown format {first['format']!r}; expected {FORMAT!r}")
            requests = read_deltas(lines, first, rest, counter)
        elif "hash_ids" in first:
            style = QWEN if "chat_id" in first else MOONCAKE
            requests = read_objects(lines, first, rest, style, ids or BlockIds(counter), block_tokens or style.block_tokens)
        else:
            lines.fail("hash_ids", f"is missing, and there is no {FORMAT} header; this is none of the known formats")
        request = None
        for request in requests:
            yield request
        if request is None:
            lines.fail("", "the file ends after its header; it has no requests")


def read_traces(
    paths: Sequence[str | PathLike[str]],
    *,
    share: bool = False,
    block_tokens: int | None = None,
    on_bytes: OnBytes | None = None,
) -> Iterator[TraceRequest]:
    """Read several traces at once, merged by time.

    Args:
        paths: the files; each one's clock is taken as it is.
        share: equal block ids of different files mean equal prefixes; else no two files have a block in common.
        block_tokens, on_bytes: as for `read_trace`.

    Raises:
        TraceError: a line cannot be read. ConfigError: no files.
    """
    if not paths:
        raise ConfigError("traces", [], "at least one file")
    counter = IdCounter()
    ids = BlockIds(counter) if share else None
    streams = [read_trace(path, counter=counter, ids=ids, block_tokens=block_tokens, on_bytes=on_bytes) for path in paths]
    return streams[0] if len(streams) == 1 else merge(*streams, key=lambda request: request.time_s)
