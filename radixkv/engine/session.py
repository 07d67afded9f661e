"""A conversation whose history is exact token ids.

    turn 1   [system, user 1] rendered, tokenised                  + generated ids
    turn 2   kept ids of turn 1                  + tail of user 2  + generated ids
    turn 3   kept ids of turns 1, 2              + tail of user 3  + ...

Re-tokenising an answer's text need not give back the tokens that were generated, and one other token early on would miss
the whole cached rest. So what the model saw and said is kept as ids; only a new turn's own text is tokenised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from radixkv.engine.config import SamplingParams
from radixkv.engine.output import Chunk, Completion
from radixkv.engine.request import Request
from radixkv.errors import ConfigError, SessionClosed
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
            SessionClosed: after close(). PromptTooLong: the conversation fills the context; rewind, or start anew.
        """
        completion = None
        for chunk in self.stream(text, params):
            completion = chunk.completion
        assert completion is not None
        return completion

    def stream(self, text: str, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Say something, and read the answer as it is generated; the last chunk carries the Completion.

        Raises:
            As `send`; when called, not when first read.
        """
        if self._closed:
            raise SessionClosed
        message = {"role": "user", "content": text}
        before = self._cursor.num_tokens
        self._cursor.append(self._tail(message))
        try:
            cursor = self._cursor if self._cache else None
            request = self._engine._request(self._cursor.tokens, params, self._namespace, self._cache, cursor)
            chunks = self._engine._stream(request)
        except BaseException:
            self._cursor.truncate(before)
            raise
        return self._read(request, chunks, message, before)

    def _tail(self, message: dict[str, str]) -> Tokens:
        """The token ids that `message` adds to the conversation."""
        tokenizer = self._engine.tokenizer
        if not self._turns:
            return Tokens(tokenizer.chat_ids([*self._messages, message], add_generation_prompt=True))
        history = self._messages[:-1]  # the last answer is kept as ids, and only marked in the rendering
        return Tokens(tokenizer.turn_tail(history, message, last_ids=self._cursor.tail(8)))

    def _read(self, request: Request, chunks: Iterator[Chunk], message: dict[str, str], before: int) -> Iterator[Chunk]:
        kept = False
        try:
            for chunk in chunks:
                if chunk.completion is not None:
                    self._keep(request, chunk.completion, message, before)
                    kept = True
                yield chunk
        finally:
            if not kept:
                self._engine._cancel([request])
                self._cursor.truncate(before)

    def _keep(self, request: Request, completion: Completion, message: dict[str, str], before: int) -> None:
        fed = self._cursor.num_tokens - len(request.prompt)  # generated tokens that were fed back, and so appended
        self._cursor.append(list(completion.token_ids[fed:]))
        self._turns.append((before, len(self._messages)))
        self._messages += [message, {"role": "assistant", "content": completion.text}]

    def fork(self) -> Session:
        """Another conversation with the same past; pages stay shared. Cost: one copy of the token ids."""
        if self._closed:
            raise SessionClosed
        other = Session(self._engine, None, namespace=self._namespace, cache=self._cache)
        other._messages = self.messages
        other._cursor = self._cursor.fork()
        other._turns = list(self._turns)
        return other

    def rewind(self, turns: int = 1) -> None:
        """Undo the last turns, to say something else instead; what they computed stays cached.

        Raises:
            ConfigError: fewer turns were taken.
        """
        if self._closed:
            raise SessionClosed
        if not 0 <= turns <= len(self._turns):
            raise ConfigError("turns", turns, f"0 to {len(self._turns)}, the turns taken")
        for _ in range(turns):
            num_tokens, num_messages = self._turns.pop()
            self._cursor.truncate(num_tokens)
            del self._messages[num_messages:]

    def close(self) -> None:
        """End the conversation. Its prefix stays cached until it is evicted. Safe to call twice."""
        self._closed = True

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session(turns={self.num_turns}, tokens={self._cursor.num_tokens})"
