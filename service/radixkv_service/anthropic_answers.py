"""What Anthropic's clients parse: a message, its usage, and the events of a stream."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from radixkv_service.errors import clean
from radixkv_service.openai_answers import Absent, Answer

if TYPE_CHECKING:
    from radixkv.engine.output import Completion

__all__ = [
    "AnswerBlock",
    "ErrorDetail",
    "ErrorMessage",
    "InputTokens",
    "Message",
    "MessagesUsage",
    "StopReason",
    "TextBlock",
    "ThinkingBlock",
    "ToolUseBlock",
    "named_event",
    "stop_reason_of",
    "usage_so_far",
    "whole_usage",
]

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class TextBlock(Answer):
    """What the model said."""

    type: Literal["text"] = "text"
    text: str


class ThinkingBlock(Answer):
    """What the model thought first. Nobody signs it here."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""


class ToolUseBlock(Answer):
    """A call that the model made."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]


class MessagesUsage(Answer):
    """Tokens of a request; the three kinds of input tokens add up to the prompt.

    Attributes:
        input_tokens: computed, and cached for nobody.
        cache_creation_input_tokens: computed, and cached from now on.
        cache_read_input_tokens: taken from the cache.
        output_tokens: of the answer.
    """

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Message(Answer):
    """An answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage


class InputTokens(Answer):
    """How long a prompt is."""

    input_tokens: int


class ErrorDetail(Answer):
    """What went wrong."""

    type: str
    message: str
    param: Absent[str] = None
    code: Absent[str] = None


class ErrorMessage(Answer):
    """Anthropic's form of an error."""

    type: Literal["error"] = "error"
    error: ErrorDetail
    request_id: str | None


def whole_usage(completion: Completion) -> MessagesUsage:
    """The usage of a finished answer."""
    # NOTE: a page whose head was copied from a cached one counts as written whole, the head too.
    written, cached = min(completion.written_tokens, completion.computed_tokens), completion.cached_tokens
    return MessagesUsage(
        input_tokens=completion.prompt_tokens - cached - written,
        cache_creation_input_tokens=written,
        cache_read_input_tokens=cached,
        output_tokens=len(completion.token_ids),
    )


def usage_so_far(num_prompt: int, num_cached: int) -> MessagesUsage:
    """The usage of an answer that begins: what of the prompt is being cached is known at its end."""
    return MessagesUsage(
        input_tokens=num_prompt - num_cached,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=num_cached,
        output_tokens=0,
    )


def stop_reason_of(completion: Completion, *, called: bool, max_tokens: int) -> StopReason:
    """Why an answer ended, in Anthropic's words.

    Args:
        completion: the answer.
        called: whether it calls a tool.
        max_tokens: of the request; fewer were generated where the context was full.
    """
    if completion.finish_reason == "length":
        return "max_tokens" if len(completion.token_ids) >= max_tokens else "model_context_window_exceeded"
    if called:
        return "tool_use"
    return "stop_sequence" if isinstance(completion.stopped_by, str) else "end_turn"


def named_event(kind: str, **fields: Any) -> bytes:
    """An event whose data say their own type, as Anthropic's streams have it."""
    data = json.dumps({"type": kind, **fields}, ensure_ascii=False, separators=(",", ":"))
    return f"event: {kind}\ndata: {clean(data)}\n\n".encode()
