"""What an answer's text is, while it arrives: thinking, words, calls of tools."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from radixkv.engine.tools import ReasoningParser, ToolCall, ToolCallParser
from radixkv_service.dialog import Dialog

if TYPE_CHECKING:
    from radixkv.engine.output import Completion

__all__ = ["AnswerParser", "Piece"]

_OPENINGS = ("<tool_call>", "[TOOL_CALLS]")
_SHORTEST = len("<tool")  # of an opening that is cut itself; what is shorter may be any text
_BARE = re.compile(r'(?:\[\s*)?\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?(?:"function"\s*:\s*\{\s*)?"name"\s*:\s*"([^"\\]*)"')


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
        cut: whether the answer ended inside a call: what there was of it is left out.
    """

    def __init__(self, dialog: Dialog) -> None:
        self._reasoning = ReasoningParser(opened=dialog.transcripts.splicer.opened)
        self._functions = dialog.functions
        self._calls = ToolCallParser(dialog.functions) if dialog.functions else None
        self._forced = dialog.forced is not None
        self._parallel = dialog.parallel
        self.num_calls = 0
        self.cut = False

    def push(self, text: str, completion: Completion | None = None) -> Piece:
        """Take the next piece of text.

        Args:
            text: it.
            completion: with the last piece: everything becomes certain.
        """
        first = self._reasoning.push(text)
        reasoning, content = first.reasoning, first.content
        if completion is not None:
            rest = self._reasoning.flush()
            reasoning, content = reasoning + rest.reasoning, content + rest.content
        if self._calls is None:
            return Piece(reasoning, content)
        parsed = self._calls.push(content)
        text, calls = parsed.text, parsed.calls
        if completion is not None:
            tail = self._calls.flush()
            text += self._finished(tail.text, completion)
            calls += tail.calls
        if not self._parallel:
            calls = calls[: max(1 - self.num_calls, 0)]
        self.num_calls += len(calls)
        return Piece(reasoning, text, calls)

    def _finished(self, held: str, completion: Completion) -> str:
        """What was held back to the end, without a call that did not come to its own."""
        if self._forced or (completion.finish_reason == "length" and self._is_head(held)):
            self.cut = self.cut or bool(held)
            return ""
        return held

    def _is_head(self, held: str) -> bool:
        """Whether text that the parser of calls held back begins one."""
        inner = held.lstrip()
        if any(inner.startswith(one) or (len(inner) >= _SHORTEST and one.startswith(inner)) for one in _OPENINGS):
            return True
        bare = _BARE.match(inner)
        return bare is not None and bare[1] in self._functions
