"""What an answer's text is, while it arrives: thinking, words, calls of tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from radixkv.engine.tools import ReasoningParser, ToolCall, ToolCallParser
from radixkv_service.dialog import Dialog

__all__ = ["AnswerParser", "Piece"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What became certain."""

    reasoning: str = ""
    text: str = ""
    calls: tuple[ToolCall, ...] = ()


@final
class AnswerParser:
    """Tells the parts of one answer apart. However its text is cut, the same comes out.

    Args:
        dialog: what it answers.

    Attributes:
        num_calls: complete calls so far.
    """

    def __init__(self, dialog: Dialog) -> None:
        self._reasoning = ReasoningParser(opened=dialog.transcripts.splicer.opened)
        self._calls = ToolCallParser(dialog.functions) if dialog.functions else None
        self._parallel = dialog.parallel
        self.num_calls = 0

    def push(self, text: str, *, last: bool = False) -> Piece:
        """Take the next piece of text; with the last one, everything becomes certain."""
        first = self._reasoning.push(text)
        reasoning, content = first.reasoning, first.content
        if last:
            rest = self._reasoning.flush()
            reasoning, content = reasoning + rest.reasoning, content + rest.content
        if self._calls is None:
            return Piece(reasoning, content)
        parsed = self._calls.push(content)
        text, calls = parsed.text, parsed.calls
        if last:
            tail = self._calls.flush()
            text, calls = text + tail.text, calls + tail.calls
        if not self._parallel:
            calls = calls[: max(1 - self.num_calls, 0)]
        self.num_calls += len(calls)
        return Piece(reasoning, text, calls)
