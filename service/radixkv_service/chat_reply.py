"""A chat completion's answer, whole or in chunks."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from time import time
from typing import TYPE_CHECKING, Any, Literal

from radixkv_service.dialog import Dialog
from radixkv_service.generation import live_usage, reason_of, usage_of
from radixkv_service.openai_answers import (
    AnswerMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    CompletionTokensDetails,
    Delta,
    ToolCallAnswer,
    ToolCallDelta,
    Usage,
)
from radixkv_service.openai_models import ChatRequest
from radixkv_service.parsing import AnswerParser, Piece
from radixkv_service.run import Run
from radixkv_service.service import Service
from radixkv_service.streaming import DONE, event

if TYPE_CHECKING:
    from radixkv.engine.output import Chunk, Completion
    from radixkv.engine.tools import ToolCall

__all__ = ["ChatReply"]


class ChatReply:
    """One request's answer, in either form.

    Args:
        service: knows the tokens' texts.
        body: the request.
        model: the name that it asked for.
        dialog: what is answered; it keeps each answer for the next turn.
    """

    def __init__(self, service: Service, body: ChatRequest, model: str, dialog: Dialog) -> None:
        self._texts = service.token_texts
        self._dialog = dialog
        self._logprobs = bool(body.logprobs)
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._live = bool(body.stream_options and body.stream_options.continuous_usage_stats)
        self._parsers = [AnswerParser(dialog) for _ in range(body.n or 1)]
        self._said: list[dict[str, Any]] = [{"role": "assistant", "content": ""} for _ in self._parsers]
        self._cached: list[int] = []
        self._output = self._thinking = 0
        self._head: Mapping[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time()),
            "model": model,
            "system_fingerprint": service.fingerprint,
        }

    # -- whole --------------------------------------------------------------------------------------------------------

    async def whole(self, run: Run) -> ChatCompletion:
        """The answer at once."""
        choices = [await self._choice(index, one) for index, one in enumerate(await run.finish())]
        return ChatCompletion(**self._head, choices=choices, usage=self._whole_usage(run))

    async def _choice(self, index: int, completion: Completion) -> ChatChoice:
        piece = self._parse(index, completion.text, completion)
        await self._remember(index, completion)
        calls = [ToolCallAnswer(id=call.id, function=_function(call)) for call in piece.calls]
        message = AnswerMessage(
            content=piece.text or (None if calls else ""),
            reasoning_content=piece.reasoning or None,
            tool_calls=calls or None,
        )
        logprobs = ChatLogprobs(content=self._texts.chat(completion.logprobs or ())) if self._logprobs else None
        reason, stopped_by = self._reason(index, completion), completion.stopped_by
        return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=reason, stop_reason=stopped_by)

    def _whole_usage(self, run: Run) -> Usage:
        usage = usage_of([[run.completions[index] for index in sorted(run.completions)]])
        if self._thinking:
            usage.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=self._thinking)
        return usage

    # -- streamed -----------------------------------------------------------------------------------------------------

    async def events(self, run: Run) -> AsyncIterator[bytes]:
        """The answer as it is made; calls of tools come whole."""
        begun: set[int] = set()
        async for index, chunk in run.chunks():
            self._cached.append(chunk.cached_tokens)
            self._output += chunk.token_id is not None
            if index not in begun:
                begun.add(index)
                yield self._event(index, Delta(role="assistant", content=""))
            before = self._parsers[index].num_calls
            piece = self._parse(index, chunk.text, chunk.completion)
            delta = _delta(piece, before)
            if delta is not None or (chunk.logprob is not None and self._logprobs):
                yield self._event(index, delta or Delta(content=""), chunk)
            if chunk.completion is not None:
                await self._remember(index, chunk.completion)
                yield self._event(index, Delta(), completion=chunk.completion)
        if self._usage:
            yield event(ChatChunk(**self._head, choices=[], usage=self._whole_usage(run)))
        yield DONE

    def _event(self, index: int, delta: Delta, chunk: Chunk | None = None, completion: Completion | None = None) -> bytes:
        choice = ChatChunkChoice(index=index, delta=delta)
        if chunk is not None and chunk.logprob is not None and self._logprobs:
            choice.logprobs = ChatLogprobs(content=self._texts.chat([chunk.logprob]))
        if completion is not None:
            choice.finish_reason = self._reason(index, completion)
            choice.stop_reason = completion.stopped_by
        usage = live_usage(len(self._dialog.prompt), min(self._cached), self._output) if self._live else None
        return event(ChatChunk(**self._head, choices=[choice], usage=usage))

    # -- both ---------------------------------------------------------------------------------------------------------

    def _parse(self, index: int, text: str, completion: Completion | None) -> Piece:
        """The next piece of an answer, noted down as its client is given it."""
        piece = self._parsers[index].push(text, completion)
        said = self._said[index]
        said["content"] += piece.text
        for call in piece.calls:
            function = {"name": call.name, "arguments": call.arguments}
            said.setdefault("tool_calls", []).append({"id": call.id, "type": "function", "function": function})
        return piece

    async def _remember(self, index: int, completion: Completion) -> None:
        """Keep the answer's ids, before its client can send the next turn: if they say what the client was told, no more."""
        dialog = self._dialog
        parser = self._parsers[index]
        if parser.cut or (parser.num_calls and not dialog.parallel and dialog.forced is None):
            return  # an unfinished call was left out, or calls after the first may have been
        exact = await asyncio.to_thread(dialog.remember, self._said[index], completion)
        self._thinking += exact.num_thinking

    def _reason(self, index: int, completion: Completion) -> Literal["stop", "length", "tool_calls"]:
        reason = reason_of(completion)
        return "tool_calls" if reason == "stop" and self._parsers[index].num_calls else reason


def _delta(piece: Piece, num_before: int) -> Delta | None:
    """What a piece adds to the message; None: nothing."""
    if not (piece.text or piece.reasoning or piece.calls):
        return None
    calls = [
        ToolCallDelta(index=at, id=call.id, function=_function(call)) for at, call in enumerate(piece.calls, num_before)
    ]
    return Delta(content=piece.text or None, reasoning_content=piece.reasoning or None, tool_calls=calls or None)


def _function(call: ToolCall) -> CalledFunction:
    return CalledFunction(name=call.name, arguments=call.arguments)
