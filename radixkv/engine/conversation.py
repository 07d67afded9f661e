r"""A whole conversation as token ids, with the answers generated here as the very ids they were generated as.

    messages    system, user 1      assistant 1          user 2             assistant 2          user 3
    rendered    ..user..assistant\n SENTINEL 1           <|im_end|>\n<|i..  SENTINEL 2           <|im_end|>\n<|im_..
    ids         tokenised alone   │ kept ids of answer 1 │ tokenised alone │ kept ids of answer 2 │ tokenised alone

The template is rendered with a sentinel in each known answer's place, the text is cut there, and each piece between is
tokenised alone: what `Session` keeps turn by turn, computed from the messages. Where a template drops an answer's thinking,
only what was spoken is put in its place. Where it refuses or hides a sentinel, or would write the pieces around it
otherwise, that message's own text is tokenised. docs/design/0010-exact-history.md says why.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from radixkv.engine.answers import ExactAnswer, exact_answer
from radixkv.engine.layout import ChatPrompt, Cut, Layout, Pieces, common_characters
from radixkv.engine.messages import part_end, rendered_message
from radixkv.engine.thinking import THINK, ThinkingTags
from radixkv.engine.tokenizer import Message, Tokenizer
from radixkv.errors import ConfigError, EngineError
from radixkv.namespace import Namespace
from radixkv.prefix import TOKEN_BYTES, common_prefix_bytes

if TYPE_CHECKING:
    from radixkv.engine.output import Completion

__all__ = ["Mark", "Splicer"]

Mark = tuple[int, int]
"""The end of a part of a message: (index of the message, index of the part in its content)."""

_FIELDS = ("reasoning_content", "reasoning", "thinking")  # where templates look for thinking, besides the content
_USER = {"role": "user", "content": "a"}
_TOOL = {"role": "tool", "content": "a", "name": "a", "tool_call_id": "a"}


class Splicer:
    """Makes prompts of messages and of the exact ids of the answers among them.

    Args:
        tokenizer: of the model.
        tags: the texts around an answer's thinking.
        max_cached_tokens: so many tokens of pieces between answers are remembered, so that a long conversation that is sent
            again is not tokenised again.

    Thread safety: any thread may call anything.
    """

    def __init__(self, tokenizer: Tokenizer, tags: ThinkingTags = THINK, max_cached_tokens: int = 2_000_000) -> None:
        self.tokenizer = tokenizer
        self.tags = tags
        self._pieces = Pieces(tokenizer, max_cached_tokens)
        # NOTE: letters and digits pass every template unchanged; nobody outside can know them, so no text holds them.
        nonce = secrets.token_hex(8)
        self._said, self._thought, self._mark = f"radixkv{nonce}s", f"radixkv{nonce}t", f"Q{nonce}m"
        self._sentinels = re.compile(f"radixkv{nonce}([st])([0-9]+)z")
        self.opened, self._lead = self._opening()
        self._field = self._thinking_field()

    def exact(self, completion: Completion) -> ExactAnswer:
        """What to keep of a completion: `exact_answer`, as this model thinks."""
        return exact_answer(self.tokenizer, completion, self.tags, opened=self.opened)

    def prompt(
        self,
        messages: Sequence[Message],
        known: Mapping[int, ExactAnswer] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        namespace: str | Namespace = "",
        marks: Sequence[Mark] = (),
    ) -> ChatPrompt:
        """Render and tokenise a conversation up to where the assistant's next answer begins.

        Cost:    two renderings (one if no answer is known) and one for each mark; only pieces not seen lately are tokenised.

        Args:
            messages: the conversation, as in a chat request.
            known: exact answers by the index of their message.
            tools: functions or schemas that the template shows to the model.
            namespace: whose conversation it is; pieces are remembered inside a namespace only.
            marks: ends of parts of messages whose place in the ids is wanted.

        Raises:
            ChatTemplateMissing: the model cannot chat.
            EngineError: the template refuses these messages.
            ConfigError: a content that is no text, or a mark at a part that is not there.
        """
        rendered = [rendered_message(message) for message in messages]
        text, cuts = self._render(rendered, known or {}, tools)
        key = (namespace if isinstance(namespace, Namespace) else Namespace(namespace)).key
        layout = Layout(self.tokenizer, self._pieces, key, text, cuts)
        spliced = tuple(cut.index for cut in cuts)
        probed = [self._probe(i, (known or {})[i]) if i in spliced else message for i, message in enumerate(rendered)]
        places = [self._place(mark, messages, probed, spliced, text, tools) for mark in marks]
        return ChatPrompt(layout.ids, spliced, tuple(layout.settled_tokens(place) for place in places))

    def dead_from(
        self,
        prompt: ChatPrompt,
        messages: Sequence[Message],
        answer: Message,
        exact: ExactAnswer,
        known: Mapping[int, ExactAnswer] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        namespace: str | Namespace = "",
    ) -> int | None:
        """Where the tokens of a finished request begin that no later turn will find, because its thinking is dropped.

        Everything from there on is dead, the answer behind the thinking too: `Retain(start, None, 0)`. After an answer that
        calls tools the next message is a tool's, and most templates show the thinking until the user speaks again.

        Args:
            prompt: of the request.
            messages: of the request.
            answer: the message it was answered with.
            exact: what was kept of it.
            known: as for `prompt`.
            tools: as for `prompt`.
            namespace: as for `prompt`.

        Returns:
            An index in prompt and generated ids, or None: nothing was thought, or the template goes on showing it.
        """
        if not exact.num_thinking:
            return None
        following = _TOOL if answer.get("tool_calls") else _USER
        known = {**(known or {}), len(messages): exact}
        try:
            later = self.prompt([*messages, answer, following], known, tools=tools, namespace=namespace)
        except EngineError:
            return None
        same = common_prefix_bytes((prompt.ids + exact.ids).data, 0, later.ids.data) // TOKEN_BYTES
        return same if same < len(prompt.ids) + exact.num_thinking else None

    # -- rendering ----------------------------------------------------------------------------------------------------

    def _render(
        self, messages: list[dict[str, Any]], known: Mapping[int, ExactAnswer], tools: Sequence[Any] | None
    ) -> tuple[str, list[Cut]]:
        """The text with sentinels, and where they stand: of all known answers, or else of those the template lets pass."""
        chosen = {i: known[i] for i in sorted(known) if 0 <= i < len(messages)}
        plain = self._try(messages, tools) if chosen else None
        while chosen:
            probed = [self._probe(i, chosen[i]) if i in chosen else message for i, message in enumerate(messages)]
            text = self._try(probed, tools)
            cuts = self._cuts(text, chosen) if text is not None else []
            if text is not None and len(cuts) == len(chosen) and (plain is None or _in_order(_around(text, cuts), plain)):
                return text, cuts
            shown = {cut.index for cut in cuts}
            fewer = shown if len(shown) < len(chosen) and text is not None else _without_calls(chosen, messages)
            if len(fewer) == len(chosen):
                break
            chosen = {i: chosen[i] for i in chosen if i in fewer}
        return (plain if plain is not None else self.tokenizer.chat_text(messages, tools=tools)), []

    def _try(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> str | None:
        try:
            return self.tokenizer.chat_text(messages, tools=tools)
        except EngineError:
            if not self.tokenizer.has_chat_template:
                raise
            return None

    def _probe(self, index: int, exact: ExactAnswer) -> dict[str, Any]:
        """A message with sentinels in place of what was generated."""
        said, thought = f"{self._said}{index}z", f"{self._thought}{index}z"
        if not exact.num_thinking:
            return {"role": "assistant", "content": said}
        if self._field is not None:
            return {"role": "assistant", "content": said, self._field: thought}
        return {"role": "assistant", "content": f"{self.tags.opening}\n{thought}\n{self.tags.closing}{said}"}

    def _cuts(self, text: str, chosen: Mapping[int, ExactAnswer]) -> list[Cut]:
        """The places of the answers whose sentinels the template shows as they should be."""
        found: dict[tuple[str, int], list[int]] = {}
        for match in self._sentinels.finditer(text):
            found.setdefault((match[1], int(match[2])), []).append(match.start())
        cuts = (
            self._cut(text, index, exact, found.get(("s", index), []), found.get(("t", index), []))
            for index, exact in chosen.items()
        )
        shown = [cut for cut in cuts if cut is not None]
        apart = all(before.stop <= after.start for before, after in pairwise(shown))
        return shown if apart else []

    def _cut(self, text: str, index: int, exact: ExactAnswer, said: list[int], thought: list[int]) -> Cut | None:
        if len(said) != 1 or len(thought) > 1:
            return None
        stop = said[0] + len(f"{self._said}{index}z")
        if not thought:
            return Cut(index, said[0], stop, exact.spoken)
        start = text.rfind(self.tags.opening, 0, thought[0])
        inside = start + len(self.tags.opening)
        if start < 0 or thought[0] > said[0] or text[inside : thought[0]].strip():
            return None
        return Cut(index, start, stop, exact.ids, self.tags.opening + self._lead if self.opened else "")

    def _place(
        self,
        mark: Mark,
        messages: Sequence[Message],
        probed: list[dict[str, Any]],
        spliced: Sequence[int],
        text: str,
        tools: Sequence[Any] | None,
    ) -> int:
        """How many characters of `text` every conversation begins with that is the same up to the mark."""
        index, part = mark
        if not 0 <= index < len(messages):
            raise ConfigError("mark", mark, f"a message's index, 0 to {len(messages) - 1}, and a part's")
        end, content = part_end(messages[index].get("content"), part), probed[index]["content"]
        end = len(content) if index in spliced else end  # an answer kept as ids has no parts
        marked = {**probed[index], "content": content[:end] + self._mark + content[end:]}
        for following in (_another(str(marked.get("role"))), probed[index + 1 :]):
            other = self._try([*probed[:index], marked, *following], tools)
            if other is not None and self._mark in other:
                return common_characters(text, other)
        return 0

    # -- the template's ways ------------------------------------------------------------------------------------------

    def _opening(self) -> tuple[bool, str]:
        """Whether a prompt ends with the opening tag, and the white space behind it."""
        text = (self._try([_USER], None) or "") if self.tokenizer.has_chat_template else ""
        return text.rstrip().endswith(self.tags.opening), text[len(text.rstrip()) :]

    def _thinking_field(self) -> str | None:
        """The key of a message where the template looks for its thinking; None: in the content."""
        for field in _FIELDS if self.tokenizer.has_chat_template else ():
            answer = {"role": "assistant", "content": "b", field: self._thought}
            for following in ([], [_TOOL], [_USER]):
                if self._thought in (self._try([_USER, answer, *following], None) or ""):
                    return field
        return None


def _without_calls(chosen: Mapping[int, ExactAnswer], messages: Sequence[Message]) -> set[int]:
    return {index for index in chosen if not messages[index].get("tool_calls")}


def _around(text: str, cuts: list[Cut]) -> Iterator[str]:
    """The pieces before, between and behind the answers."""
    at = 0
    for cut in cuts:
        yield text[at : cut.start]
        at = cut.stop
    yield text[at:]


def _in_order(pieces: Iterator[str], plain: str) -> bool:
    """Whether `plain` is these pieces with something between: marking the answers has changed nothing else."""
    first, *between, last = pieces
    at = len(first)
    if not plain.startswith(first):
        return False
    for piece in between:
        found = plain.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return len(plain) - at >= len(last) and plain.endswith(last)


def _another(role: str) -> list[Message]:
    """Messages that may follow one of `role`, as another conversation would go on."""
    return [_USER] if role in ("assistant", "system", "developer") else [{"role": "assistant", "content": "b"}, _USER]
