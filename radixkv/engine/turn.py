"""One session's state, and an open turn of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from radixkv.engine.answers import ExactAnswer
from radixkv.engine.layout import ChatPrompt
from radixkv.engine.messages import rendered_message
from radixkv.engine.tokenizer import Message
from radixkv.namespace import Namespace

if TYPE_CHECKING:
    from radixkv.engine.output import Completion
    from radixkv.engine.session_store import SessionStore

__all__ = ["SessionState", "Turn", "copied", "num_chars"]


@dataclass(slots=True)
class SessionState:
    """What the store holds of one session; changed under the store's lock.

    Attributes:
        namespace: key of its owner's namespace.
        tenant: who may have only so many sessions.
        messages: the conversation, without an open turn.
        tools: for the template.
        ttl_s: seconds without use after which it is gone.
        expires_s: when that is, by the store's clock.
        known: exact answers, by the index of their message.
        turns: how many messages there were before each finished turn.
        settled: messages that belong to the opening or to finished turns; the next turn's follow.
        chars: of its messages.
        turn: the open one.
    """

    namespace: bytes
    tenant: object
    messages: list[dict[str, Any]]
    tools: Sequence[Any] | None
    ttl_s: float
    expires_s: float = 0.0
    known: dict[int, ExactAnswer] = field(default_factory=dict)
    turns: list[int] = field(default_factory=list)
    settled: int = 0
    chars: int = 0
    turn: Turn | None = None


class Turn:
    """An open turn of a session. Made by `SessionStore.turn`; as a context manager it is undone unless it was kept.

    Attributes:
        session_id: of its session.
        namespace: of its session.
        tools: of its session.
        said: the conversation that is to be answered; not to be changed.
        chars: of it.
        known: the exact answers in it, by the index of their message.
        prompt: the ids to answer.
    """

    prompt: ChatPrompt

    def __init__(
        self,
        store: SessionStore,
        session_id: str,
        namespace: str | Namespace,
        said: list[dict[str, Any]],
        tools: Sequence[Any] | None,
        chars: int,
    ) -> None:
        self._store = store
        self.said = said
        self.chars = chars
        self.known: dict[int, ExactAnswer] = {}
        self.session_id = session_id
        self.namespace = namespace
        self.tools = tools

    def keep(self, answer: Message, completion: Completion) -> ExactAnswer:
        """End the turn with its answer.

        Args:
            answer: the assistant's message, as its client was given it.
            completion: the answer.

        Returns:
            What was kept.

        Raises:
            SessionNotFound: the session was closed meanwhile. SessionBusy: the turn was kept or undone before.
            ConfigError: an answer that is no assistant's message.
        """
        (said,) = copied([answer])
        exact = self._store.transcripts.remember(self.said, said, completion, tools=self.tools, namespace=self.namespace)
        self._store._finish(self, said, exact)
        return exact

    def undo(self) -> None:
        """Take the turn back: the session is as before it. Safe to call twice, and after `keep`."""
        self._store._undo(self)

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def copied(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copies that nobody else can change, of messages that can be rendered."""
    for message in messages:
        rendered_message(message)
    return [deepcopy(dict(message)) for message in messages]


def num_chars(value: object) -> int:
    """Characters of messages, the names of their fields included. Cost: O(values in them)."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(num_chars(name) + num_chars(inner) for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return sum(map(num_chars, value))
    return 1
