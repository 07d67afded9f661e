"""The two formats of one JSON object a line: Mooncake and Qwen-Bailian.

    Mooncake      {"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 7, 8]}
    Qwen-Bailian  the same, and "chat_id", "parent_chat_id" (-1: none), "type", "turn"; timestamps in seconds

Sources: github.com/kvcache-ai/Mooncake, FAST'25 release; github.com/alibaba-edu/qwen-bailian-usagetraces-anon.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from radixkv.replay.blocks import BlockIds
from radixkv.replay.lines import TraceLines
from radixkv.replay.trace import TraceRequest

__all__ = ["MOONCAKE", "QWEN", "ObjectFormat", "read_objects"]


@dataclass(frozen=True, slots=True)
class ObjectFormat:
    """What differs between the formats.

    Attributes:
        name: for reports.
        block_tokens: tokens in a block.
        seconds_per_unit: of the timestamps.
        has_chats: whether requests name their chat and the request they continue.
    """

    name: str
    block_tokens: int
    seconds_per_unit: float
    has_chats: bool


MOONCAKE = ObjectFormat("mooncake", block_tokens=512, seconds_per_unit=1e-3, has_chats=False)
"""Mooncake's traces; their ids name a block and all before it."""
QWEN = ObjectFormat("qwen-bailian", block_tokens=16, seconds_per_unit=1.0, has_chats=True)
"""Qwen-Bailian's traces; their ids name a block alone."""


def read_objects(
    lines: TraceLines, first: dict[str, Any], rest: Iterator[str], style: ObjectFormat, ids: BlockIds, block_tokens: int
) -> Iterator[TraceRequest]:
    """Requests of a trace whose first line is `first`, parsed already, and whose other lines are `rest`.

    Memory: one line, and what `ids` keeps.

    Raises:
        TraceError: a line is not what the format says.
    """
    time_s, record = 0.0, first
    while True:
        request = _request(lines, record, style, ids, block_tokens, time_s)
        time_s = request.time_s
        yield request
        text = next(rest, None)
        if text is None:
            return
        record = lines.parse(text)
        if type(record) is not dict:
            lines.fail("", "is not a JSON object, as the lines before it are")


def _request(
    lines: TraceLines, record: dict[str, Any], style: ObjectFormat, ids: BlockIds, block_tokens: int, last_s: float
) -> TraceRequest:
    for field in ("timestamp", "input_length", "output_length", "hash_ids"):
        if field not in record:
            lines.fail(field, "is missing")
    num_input = lines.integer("input_length", record["input_length"])
    num_full = num_input // block_tokens
    raw = _hash_ids(lines, record["hash_ids"], num_input, style, block_tokens)
    return TraceRequest(
        time_s=lines.seconds("timestamp", record["timestamp"], style.seconds_per_unit, last_s),
        num_input_tokens=num_input,
        num_output_tokens=lines.integer("output_length", record["output_length"]),
        blocks=ids.intern(raw[:num_full]),
        block_tokens=block_tokens,
        continues=_continues(lines, record) if style.has_chats else None,
        turn=lines.integer("turn", record["turn"]) if "turn" in record else None,
        kind=_kind(lines, record),
    )


def _hash_ids(lines: TraceLines, raw: object, num_input_tokens: int, style: ObjectFormat, block_tokens: int) -> list[int]:
    """The checked ids; as many as the prompt has blocks, the partial last one counted or not.

    NOTE: Qwen-Bailian requests may have fewer (images have tokens and no text to hash): the rest is never cached.
    """
    if type(raw) is not list:
        lines.fail("hash_ids", f"expected a list of integers, got {type(raw).__name__}")
    if set(map(type, raw)) - {int} or (raw and min(raw) < 0):
        index = next(i for i, value in enumerate(raw) if type(value) is not int or value < 0)
        lines.integer(f"hash_ids[{index}]", raw[index], 0, 2**256)
    if raw and max(raw) >= 2**256:
        lines.integer(f"hash_ids[{raw.index(max(raw))}]", max(raw), 0, 2**256 - 1)
    least = 0 if style.has_chats else num_input_tokens // block_tokens
    most = -(-num_input_tokens // block_tokens)
    if not least <= len(raw) <= most:
        lines.fail(
            "hash_ids",
            f"{len(raw)} ids for {num_input_tokens} tokens, which are {most} blocks of {block_tokens}; "
            "if the trace has blocks of another size, give it with --block-tokens",
        )
    return raw


def _continues(lines: TraceLines, record: dict[str, Any]) -> bool:
    """Whether the request names a parent. The parent itself may lie before the recording began."""
    parent = lines.integer("parent_chat_id", record.get("parent_chat_id", -1), -1, 2**63 - 1)
    if lines.integer("chat_id", record.get("chat_id"), 0, 2**63 - 1) == parent:
        lines.fail("parent_chat_id", f"{parent} is the request itself")
    return parent >= 0


def _kind(lines: TraceLines, record: dict[str, Any]) -> str:
    kind = record.get("type", "")
    if type(kind) is not str:
        lines.fail("type", f"expected text, got {type(kind).__name__}")
    return kind
