"""An answer as blocks: thinking, text, and calls of tools.

pieces (parsing.py) ── Blocks ──▶ content_block_start, content_block_delta ..., content_block_stop
                          └─────▶ what its client will send back
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, final

from radixkv_service.anthropic_answers import AnswerBlock, TextBlock, ThinkingBlock, ToolUseBlock, named_event
from radixkv_service.surrogates import clean_json

if TYPE_CHECKING:
    from radixkv.engine.tools import ToolCall
    from radixkv_service.parsing import Piece

__all__ = ["Blocks"]


@final
class Blocks:
    """The blocks of one answer.

    Args:
        thinking: whether thinking is shown.

    Attributes:
        blocks: all of them, as far as they are known.
    """

    def __init__(self, *, thinking: bool) -> None:
        self._thinking = thinking
        self._open = False
        self.blocks: list[AnswerBlock] = []

    def add(self, piece: Piece) -> Iterator[bytes]:
        """Take a piece, and make its events; a call comes whole."""
        if piece.reasoning and self._thinking:
            yield from self._think(piece.reasoning)
        if piece.text:
            yield from self._say(piece.text)
        for call in piece.calls:
            yield from self._call(call)

    def close(self) -> Iterator[bytes]:
        """End the block that is open, if one is."""
        if self._open:
            self._open = False
            yield named_event("content_block_stop", index=len(self.blocks) - 1)

    @property
    def called(self) -> bool:
        """Whether a tool is called."""
        return any(isinstance(block, ToolUseBlock) for block in self.blocks)

    def message(self) -> dict[str, Any]:
        """The assistant's message, in OpenAI's form."""
        text = "".join(block.text for block in self.blocks if isinstance(block, TextBlock))
        message: dict[str, Any] = {"role": "assistant", "content": text}
        calls = [block for block in self.blocks if isinstance(block, ToolUseBlock)]
        if calls:
            message["tool_calls"] = [
                {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": json.dumps(one.input)}}
                for one in calls
            ]
        return message

    def _think(self, text: str) -> Iterator[bytes]:
        block = self.blocks[-1] if self._open else None
        if not isinstance(block, ThinkingBlock):
            block = ThinkingBlock(thinking="")
            yield from self._begin(block)
        block.thinking += text
        yield self._delta({"type": "thinking_delta", "thinking": text})

    def _say(self, text: str) -> Iterator[bytes]:
        block = self.blocks[-1] if self._open else None
        if not isinstance(block, TextBlock):
            block = TextBlock(text="")
            yield from self._begin(block)
        block.text += text
        yield self._delta({"type": "text_delta", "text": text})

    def _call(self, call: ToolCall) -> Iterator[bytes]:
        block = ToolUseBlock(id=call.id, name=call.name, input={})
        yield from self._begin(block)
        block.input = clean_json(json.loads(call.arguments))
        yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        yield from self.close()

    def _begin(self, block: AnswerBlock) -> Iterator[bytes]:
        yield from self.close()
        self.blocks.append(block)
        self._open = True
        yield named_event("content_block_start", index=len(self.blocks) - 1, content_block=block.model_dump())

    def _delta(self, delta: dict[str, str]) -> bytes:
        return named_event("content_block_delta", index=len(self.blocks) - 1, delta=delta)
