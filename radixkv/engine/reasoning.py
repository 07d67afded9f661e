"""What a model thinks before it answers, told from the answer: `<think>...</think>` at its start."""

from __future__ import annotations

from dataclasses import dataclass

from radixkv.engine.thinking import THINK, ThinkingTags

__all__ = ["ParsedReasoning", "ReasoningParser", "opens_reasoning"]


@dataclass(frozen=True, slots=True)
class ParsedReasoning:
    """What became certain: a piece of the reasoning, a piece of the answer behind it."""

    reasoning: str = ""
    content: str = ""


def opens_reasoning(prompt: str, tags: ThinkingTags = THINK) -> bool:
    """Whether a rendered prompt ends inside `<think>`, so that the answer starts with reasoning and no tag."""
    return prompt.rstrip().endswith(tags.opening)


class ReasoningParser:
    """Splits an answer while it arrives. However it is cut into pieces, the same comes out.

    White space around the reasoning belongs to neither part. An answer without `<think>` at its start comes out
    unchanged; one that never closes it is reasoning to its end.

    Args:
        opened: the prompt has opened `<think>` already, see `opens_reasoning`.
        tags: the texts around the reasoning.
    """

    def __init__(self, *, opened: bool = False, tags: ThinkingTags = THINK) -> None:
        self._opening, self._closing = tags.opening, tags.closing
        self._held = ""
        self._opened = opened
        self._thought = False
        self._state = "start"  # then: thinking, behind it, answering

    def push(self, text: str) -> ParsedReasoning:
        """Take the next piece; returns what became certain."""
        self._held += text
        return self._take(final=False)

    def flush(self) -> ParsedReasoning:
        """Return what is still held back: the answer has ended."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> ParsedReasoning:
        if self._state == "start":
            self._begin(final=final)
        reasoning = self._think(final=final) if self._state == "thinking" else ""
        if self._state == "behind":
            self._held = self._held.lstrip()
            self._state = "answering" if self._held else "behind"
        content = ""
        if self._state == "answering":
            content, self._held = self._held, ""
        return ParsedReasoning(reasoning, content)

    def _begin(self, *, final: bool) -> None:
        inner = self._held.lstrip()
        if inner.startswith(self._opening):
            self._held, self._state = inner[len(self._opening) :], "thinking"
        elif final or not self._opening.startswith(inner):
            self._state = "thinking" if self._opened else "answering"

    def _think(self, *, final: bool) -> str:
        """The reasoning that is certain: not the head of its end, and no white space that may be its last."""
        if not self._thought:
            self._held = self._held.lstrip()
        before, closed, after = self._held.partition(self._closing)
        if closed:
            self._held, self._state = after, "behind"
            return before.rstrip()
        if final:
            self._held = ""
            return before.rstrip()
        longest = min(len(self._closing) - 1, len(before))
        head = next((n for n in range(longest, 0, -1) if before.endswith(self._closing[:n])), 0)
        certain = before[: len(before) - head].rstrip()
        self._held = before[len(certain) :]
        self._thought = self._thought or bool(certain)
        return certain
