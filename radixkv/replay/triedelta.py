"""triedelta-1: a trace as differences between requests.

    {"format": "triedelta-1", "block_tokens": 512, "fields": [...], ...}     first line
    [0, 1100, 5, -1, 0, 2]      timestamp_ms, input_length, output_length, parent_request, shared_blocks, new_blocks
    [9, 2100, 5,  0, 1, 3]      its blocks are the first 1 of request 0's, then 3 new ones

Any earlier request may be named as a parent, up to the last line, so none can be forgotten: 16 bytes of each are kept.
What a request's blocks are is worked out by climbing from parent to parent, which stops at the nearest request whose
expanded blocks are still at hand. Those are kept up to a fixed number of blocks, the last used first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from radixkv.replay.blocks import IdCounter
from radixkv.replay.lines import TraceLines
from radixkv.replay.trace import BlockArray, TraceRequest

__all__ = ["FORMAT", "DeltaTree", "read_deltas"]

FORMAT = "triedelta-1"
"""What the header's "format" says."""

_FIELDS = ["timestamp_ms", "input_length", "output_length", "parent_request", "shared_blocks", "new_blocks"]
_KEPT_BLOCKS = 2**22  # 16 MiB of expanded requests


class DeltaTree:
    """Which blocks each request has, kept as what it shares and what it adds.

    Args:
        counter: where new blocks get their ids.
        kept_blocks: how many blocks of expanded requests to keep at hand.

    Memory: 16 B a request, and 4 B x `kept_blocks`.
    """

    __slots__ = ("_counter", "_expanded", "_first", "_kept", "_limit", "_new", "_parent", "_shared")

    def __init__(self, counter: IdCounter, kept_blocks: int = _KEPT_BLOCKS) -> None:
        self._counter = counter
        self._limit = kept_blocks
        self._parent, self._shared = array("i"), array("i")
        self._first, self._new = array("i"), array("i")
        self._expanded: OrderedDict[int, BlockArray] = OrderedDict()
        self._kept = 0

    def __len__(self) -> int:
        return len(self._parent)

    def num_blocks(self, request: int) -> int:
        """Blocks of an earlier request."""
        return self._shared[request] + self._new[request]

    def add(self, parent: int, num_shared: int, num_new: int) -> BlockArray:
        """The blocks of the next request.

        Cost: O(its blocks + requests climbed over).

        Args:
            parent: an earlier request, or -1 with nothing shared.
            num_shared: leading blocks it has in common with `parent`, which has so many.
            num_new: blocks that follow.
        """
        first = self._counter.take(num_new)
        blocks = np.empty(num_shared + num_new, np.int32)
        blocks[num_shared:] = np.arange(first, first + num_new, dtype=np.int32)
        self._fill(blocks, parent, num_shared)
        self._keep(len(self._parent), blocks)
        for column, value in ((self._parent, parent), (self._shared, num_shared), (self._first, first)):
            column.append(value)
        self._new.append(num_new)
        return blocks

    def _fill(self, blocks: BlockArray, request: int, end: int) -> None:
        """Write the first `end` blocks of `request` to the front of `blocks`."""
        while end > 0:
            at_hand = self._expanded.get(request)
            if at_hand is not None:
                blocks[:end] = at_hand[:end]
                self._expanded.move_to_end(request)
                return
            start = self._shared[request]
            if end > start:
                first = self._first[request]
                blocks[start:end] = np.arange(first, first + end - start, dtype=np.int32)
                end = start
            request = self._parent[request]

    def _keep(self, request: int, blocks: BlockArray) -> None:
        self._expanded[request] = blocks
        self._kept += len(blocks)
        while self._kept > self._limit:
            self._kept -= len(self._expanded.popitem(last=False)[1])


def read_deltas(
    lines: TraceLines, header: dict[str, Any], rest: Iterator[str], counter: IdCounter
) -> Iterator[TraceRequest]:
    """Requests of a trace whose header is parsed already.

    A request continues its parent if it shares all of the parent's blocks; sharing fewer is a common beginning.

    Raises:
        TraceError: a line is not what the format says.
    """
    block_tokens = lines.integer("block_tokens", header.get("block_tokens"), 1, 2**20)
    if header.get("fields") != _FIELDS:
        lines.fail("fields", f"expected {_FIELDS}")
    tree, time_s = DeltaTree(counter), 0.0
    for text in rest:
        row = lines.parse(text)
        if type(row) is not list or len(row) != len(_FIELDS):
            lines.fail("", f"expected an array of {len(_FIELDS)} numbers: {', '.join(_FIELDS)}")
        time_s = lines.seconds("timestamp_ms", row[0], 1e-3, time_s)
        num_input = lines.integer("input_length", row[1])
        num_output = lines.integer("output_length", row[2])
        parent, num_shared, num_new = _delta(lines, row, tree, num_input, block_tokens)
        continues = parent >= 0 and num_shared == tree.num_blocks(parent)
        blocks = tree.add(parent, num_shared, num_new)[: num_input // block_tokens]
        yield TraceRequest(time_s, num_input, num_output, blocks, block_tokens, continues)


def _delta(
    lines: TraceLines, row: list[object], tree: DeltaTree, num_input_tokens: int, block_tokens: int
) -> tuple[int, int, int]:
    """The checked parent, shared and new blocks of one line."""
    parent = lines.integer("parent_request", row[3], -1, 2**31 - 1)
    if parent >= len(tree):
        lines.fail("parent_request", f"unknown request {parent}; this is request {len(tree)}, counted from 0")
    num_shared = lines.integer("shared_blocks", row[4])
    num_new = lines.integer("new_blocks", row[5])
    limit = tree.num_blocks(parent) if parent >= 0 else 0
    if num_shared > limit:
        lines.fail("shared_blocks", f"{num_shared} blocks shared with request {parent}, which has {limit}")
    most = -(-num_input_tokens // block_tokens)
    if not num_input_tokens // block_tokens <= num_shared + num_new <= most:
        lines.fail(
            "new_blocks",
            f"{num_shared} shared and {num_new} new blocks for {num_input_tokens} tokens, "
            f"which are {most} blocks of {block_tokens}",
        )
    return parent, num_shared, num_new
