"""Answers given lately, found again when a client resends the conversation that led to them.

    digest 0        digest 1          digest 2             digest 3
    namespace  ──▶  system, user  ──▶ assistant        ──▶ user  ──▶ ...      each over the one before and a message
    + tools                           └─ (namespace, digest 2) -> exact ids

Chat clients hold no handle: they send all messages again, each time. The digest of an answer and of everything before it
says which answer that was, and its ids go into the prompt as they were generated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock
from typing import TYPE_CHECKING, Any

from radixkv.engine.answers import ExactAnswer
from radixkv.engine.conversation import Mark, Splicer
from radixkv.engine.layout import ChatPrompt
from radixkv.engine.messages import canonical_message, canonical_tools
from radixkv.engine.thinking import THINK, ThinkingTags
from radixkv.engine.tokenizer import Message, Tokenizer
from radixkv.errors import ConfigError
from radixkv.namespace import Namespace

if TYPE_CHECKING:
    from radixkv.engine.output import Completion

__all__ = ["TranscriptStats", "Transcripts"]

_OVERHEAD = 32  # tokens that the memory of an entry besides its ids amounts to

_Key = tuple[bytes, bytes]  # namespace, digest


@dataclass(frozen=True, slots=True)
class TranscriptStats:
    """What is remembered, and how often assistant messages of prompts were.

    Attributes:
        num_answers: answers remembered now.
        num_tokens: what they count against `max_tokens`.
        found: assistant messages looked up and found.
        unknown: assistant messages looked up and not found: not generated here, changed, or forgotten.
    """

    num_answers: int
    num_tokens: int
    found: int
    unknown: int


class Transcripts:
    """Exact ids of the answers given lately, by the conversations that led to them.

    Args:
        tokenizer: of the model.
        max_tokens: so many tokens of answers are remembered; the least recently used ones are forgotten first.
        tags: the texts around an answer's thinking.

    Attributes:
        splicer: makes the prompts.

    Namespaces never mix: a conversation of one is not found from another, whatever it says.

    Thread safety: any thread may call anything; nothing is tokenised under the lock.

    Raises:
        ConfigError: max_tokens below 0.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int = 4_000_000, tags: ThinkingTags = THINK) -> None:
        if max_tokens < 0:
            raise ConfigError("max_tokens", max_tokens, "at least 0; 0 remembers nothing")
        self.splicer = Splicer(tokenizer, tags)
        self._max_tokens = max_tokens
        self._num_tokens = self._found = self._unknown = 0
        self._answers: OrderedDict[_Key, ExactAnswer] = OrderedDict()
        self._lock = Lock()

    def remember(
        self,
        messages: Sequence[Message],
        answer: Message,
        completion: Completion,
        *,
        tools: Sequence[Any] | None = None,
        namespace: str | Namespace = "",
    ) -> ExactAnswer:
        """Keep an answer's ids for the turns after it.

        Cost:    O(characters of the messages), to digest them; one decoding of the answer.

        Args:
            messages: of the request.
            answer: the message it was answered with, as its client was given it.
            completion: the answer.
            tools: of the request.
            namespace: of the request.

        Returns:
            What was kept.

        Raises:
            ConfigError: a content that is no text, or an answer that is no assistant's message.
        """
        if answer.get("role") != "assistant":
            raise ConfigError("role", answer.get("role"), "'assistant', of an answer")
        exact = self.splicer.exact(completion)
        key = self._keys([*messages, answer], tools, namespace)[len(messages)]
        with self._lock:
            self._forget(key)
            self._answers[key] = exact
            self._num_tokens += _weight(exact)
            while self._num_tokens > self._max_tokens:
                self._forget(next(iter(self._answers)))
        return exact

    def known(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, namespace: str | Namespace = ""
    ) -> dict[int, ExactAnswer]:
        """The answers among the messages that are remembered, by the index of their message.

        Cost:    O(characters of the messages).

        Raises:
            ConfigError: a content that is no text.
        """
        keys = self._keys(messages, tools, namespace)
        known: dict[int, ExactAnswer] = {}
        with self._lock:
            for index, key in keys.items():
                exact = self._answers.get(key)
                if exact is not None:
                    self._answers.move_to_end(key)
                    known[index] = exact
            self._found += len(known)
            self._unknown += len(keys) - len(known)
        return known

    def prompt_ids(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        namespace: str | Namespace = "",
        marks: Sequence[Mark] = (),
    ) -> ChatPrompt:
        """The prompt of a chat request, with every answer that is remembered as the ids it was generated as.

        Args, Cost, Raises: as `Splicer.prompt`.
        """
        known = self.known(messages, tools=tools, namespace=namespace)
        return self.splicer.prompt(messages, known, tools=tools, namespace=namespace, marks=marks)

    def dead_from(
        self,
        prompt: ChatPrompt,
        messages: Sequence[Message],
        answer: Message,
        exact: ExactAnswer,
        *,
        tools: Sequence[Any] | None = None,
        namespace: str | Namespace = "",
    ) -> int | None:
        """Where the tokens of a finished request begin that no later turn will find; `Splicer.dead_from` says more."""
        if not exact.num_thinking:
            return None
        known = self.known(messages, tools=tools, namespace=namespace)
        return self.splicer.dead_from(prompt, messages, answer, exact, known, tools=tools, namespace=namespace)

    def forget(self, namespace: str | Namespace) -> int:
        """Forget all answers of a namespace; returns how many. Cost: O(answers remembered)."""
        key = _namespace_key(namespace)
        with self._lock:
            gone = [entry for entry in self._answers if entry[0] == key]
            for entry in gone:
                self._forget(entry)
        return len(gone)

    def stats(self) -> TranscriptStats:
        """What is remembered now, and totals since the start."""
        with self._lock:
            return TranscriptStats(len(self._answers), self._num_tokens, self._found, self._unknown)

    def _forget(self, key: _Key) -> None:
        exact = self._answers.pop(key, None)
        if exact is not None:
            self._num_tokens -= _weight(exact)

    def _keys(self, messages: Sequence[Message], tools: Sequence[Any] | None, namespace: str | Namespace) -> dict[int, _Key]:
        """A key for each assistant message, by its index."""
        space = _namespace_key(namespace)
        running = blake2b(digest_size=32, key=space)
        keys: dict[int, _Key] = {}
        for index, field in enumerate([canonical_tools(tools), *map(self._canonical, messages)], start=-1):
            running.update(len(field).to_bytes(8, "little"))
            running.update(field)
            if index >= 0 and messages[index].get("role") == "assistant":
                keys[index] = (space, running.digest())
        return keys

    def _canonical(self, message: Message) -> bytes:
        return canonical_message(message, self.splicer.tags, opened=self.splicer.opened)


def _namespace_key(namespace: str | Namespace) -> bytes:
    return (namespace if isinstance(namespace, Namespace) else Namespace(namespace)).key


def _weight(exact: ExactAnswer) -> int:
    return len(exact.ids) + (len(exact.spoken) if exact.num_thinking else 0) + _OVERHEAD
