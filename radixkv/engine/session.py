"""A conversation whose history is exact token ids.

    turn 1   [system, user 1] rendered, tokenised                  + generated ids
    turn 2   kept ids of turn 1                  + tail of user 2  + generated ids
    turn 3   kept ids of turns 1, 2              + tail of user 3  + ...

Re-tokenising an answer's text need not give back the tokens that were generated, and one other token early on would miss
the whole cached rest. So what the model saw and said is kept as ids; only a new turn's own text is tokenised.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING

from radixkv.engine.answers import exact_answer
from radixkv.engine.options import WILL_CONTINUE, RequestOptions
from radixkv.engine.output import Chunk, Completion
from radixkv.engine.request import Request
from radixkv.engine.sampling import SamplingParams
from radixkv.errors import ConfigError, SessionBusy, SessionClosed
from radixkv.namespace import Namespace
from radixkv.tokens import Tokens

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine

__all__ = ["Session"]


class Session:
    """A chat. Made by `Engine.chat`; one turn at a time; a context manager.

    A turn that fails, or whose stream is closed before its end, is undone; what it computed stays cached.
    """

    def __init__(self, engine: Engine, system: str | None, *, namespace: str | Namespace, cache: bool) -> None:
        self._engine = engine
        self._namespace = namespace
        self._cache = cache
        self._messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self._cursor = engine.cache.cursor(namespace)
        self._turns: list[tuple[int, int]] = []  # (tokens, messages) before each turn
        self._closed = False
        self._undo_to: int | None = None  # while a turn is open: how many tokens there were before it
        self._reading = False
        self._lock = Lock()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, as messages; a copy."""
        return [dict(message) for message in self._messages]

    @property
    def tokens(self) -> Tokens:
        """The exact token ids of the conversation so far: all prompts and answers."""
        return self._cursor.tokens

    @property
    def num_turns(self) -> int:
        """Finished turns."""
        return len(self._turns)

    def send(self, text: str, params: SamplingParams | None = None) -> Completion:
        """Say something, and wait for the answer.

        Raises:
            SessionClosed: after close(). SessionBusy: another turn is open.
            PromptTooLong: the conversation fills the context; rewind, or start anew.
        """
        *_, last = self.stream(text, params)
        assert last.completion is not None
        return last.completion

    def stream(self, text: str, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Say something, and read the answer as it is generated; the last chunk carries the Completion.

        The turn opens with the first chunk asked for, and is undone if the stream is closed before its end.

        Raises:
            As `send`; a prompt that cannot be run when called, SessionBusy also when first read.
        """
        self._require_ready()
        message = {"role": "user", "content": text}
        before = self._cursor.num_tokens
        tail = self._tail(message)
        cursor = self._cursor if self._cache else None
        options = RequestOptions(namespace=self._namespace, cache=self._cache, tag=WILL_CONTINUE)
        request = self._engine._request(self._cursor.tokens + tail, params, options, cursor)
        return self._read(request, tail, message, before)

    def _tail(self, message: dict[str, str]) -> Tokens:
        """The token ids that `message` adds to the conversation."""
        tokenizer = self._engine.tokenizer
        if not self._turns:
            return Tokens(tokenizer.chat_ids([*self._messages, message], add_generation_prompt=True))
        history = self._messages[:-1]  # the last answer is kept as ids, and only marked in the rendering
        return Tokens(tokenizer.turn_tail(history, message, last_ids=self._cursor.tail(8)))

    def _read(self, request: Request, tail: Tokens, message: dict[str, str], before: int) -> Iterator[Chunk]:
        """The turn itself, from the first chunk asked for to the last, or to its undoing."""
        with self._lock:
            self._require_ready()
            if self._cursor.num_tokens != before:
                raise SessionBusy
            self._undo_to, self._reading = before, True
            self._cursor.append(tail)
        chunks = self._engine._read(request)
        try:
            for chunk in chunks:
                if chunk.completion is not None and chunk.completion.finish_reason != "cancelled":
                    self._keep(request, chunk.completion, message, before)
                yield chunk
        finally:
            chunks.close()
            self._reading = False
            self._undo()

    def _undo(self) -> None:
        """Take back an open turn, if there is one whose request has let go of the cursor."""
        if self._undo_to is not None and not self._cursor.leased:
            self._cursor.truncate(self._undo_to)
            self._undo_to = None

    def _require_ready(self) -> None:
        if self._closed:
            raise SessionClosed
        if not self._reading:
            self._undo()
        if self._undo_to is not None:
            raise SessionBusy

    def _keep(self, request: Request, completion: Completion, message: dict[str, str], before: int) -> None:
        exact = exact_answer(self._engine.tokenizer, completion).ids  # without a stop text, which the reader never saw
        fed = self._cursor.num_tokens - len(request.prompt)  # generated tokens that were fed back, and so appended
        pairs = zip(exact.tolist()[:fed], completion.token_ids, strict=False)  # inside the last a stop text may begin
        kept = next((n for n, (one, other) in enumerate(pairs) if one != other), min(fed, len(exact)))
        self._cursor.truncate(len(request.prompt) + kept)
        self._cursor.append(exact[kept:])
        self._turns.append((before, len(self._messages)))
        self._messages += [message, {"role": "assistant", "content": completion.text}]
        self._undo_to = None

    def fork(self) -> Session:
        """Another conversation with the same past; pages stay shared. Cost: one copy of the token ids.

        Raises:
            SessionClosed: after close(). SessionBusy: a turn is open.
        """
        self._require_ready()
        other = Session(self._engine, None, namespace=self._namespace, cache=self._cache)
        other._messages = self.messages
        other._cursor = self._cursor.fork()
        other._turns = list(self._turns)
        return other

    def rewind(self, turns: int = 1) -> None:
        """Undo the last turns, to say something else instead; what they computed stays cached.

        Raises:
            ConfigError: fewer turns were taken. SessionBusy: a turn is open.
        """
        self._require_ready()
        if not 0 <= turns <= len(self._turns):
            raise ConfigError("turns", turns, f"0 to {len(self._turns)}, the turns taken")
        if turns:
            num_tokens, num_messages = self._turns[-turns]
            self._cursor.truncate(num_tokens)
            del self._messages[num_messages:], self._turns[-turns:]

    def close(self) -> None:
        """End the conversation. Its prefix stays cached until it is evicted. Safe to call twice."""
        self._closed = True

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session(turns={self.num_turns}, tokens={self._cursor.num_tokens})"
