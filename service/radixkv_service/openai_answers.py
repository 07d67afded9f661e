"""What OpenAI's clients parse: answers, whole and in chunks, usage, models, errors."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Absent",
    "Answer",
    "AnswerMessage",
    "CalledFunction",
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatLogprobs",
    "CompletionChoice",
    "CompletionLogprobs",
    "CompletionTokensDetails",
    "Delta",
    "ErrorBody",
    "ErrorObject",
    "LikelyToken",
    "Model",
    "ModelList",
    "PromptTokensDetails",
    "TextCompletion",
    "TokenDetail",
    "ToolCallAnswer",
    "ToolCallDelta",
    "Usage",
]

T = TypeVar("T")
Absent = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
"""Left out of the JSON where it is None."""

Reason = Literal["stop", "length", "tool_calls"]


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(protected_namespaces=())


class PromptTokensDetails(Answer):
    """Where the prompt's tokens came from. `created_cache_tokens` is vLLM's name for those cached from now on."""

    cached_tokens: int
    created_cache_tokens: int = 0


class CompletionTokensDetails(Answer):
    """What the answer's tokens were."""

    reasoning_tokens: int = 0


class Usage(Answer):
    """Tokens of a request; `prompt_tokens` includes the cached ones."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: Absent[CompletionTokensDetails] = None


class LikelyToken(Answer):
    """A token that could have stood here."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenDetail(LikelyToken):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(Answer):
    """Log probabilities, as chat completions carry them."""

    content: list[TokenDetail] | None
    refusal: None = None


class CalledFunction(Answer):
    """The function of a call."""

    name: str
    arguments: str


class ToolCallAnswer(Answer):
    """A call that the model made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ToolCallDelta(ToolCallAnswer):
    """A call in a chunk; calls come whole."""

    index: int


class AnswerMessage(Answer):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: Absent[str] = None
    tool_calls: Absent[list[ToolCallAnswer]] = None


class ChatChoice(Answer):
    """One answer of a chat completion."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason
    stop_reason: Absent[str | int] = None


class ChatCompletion(Answer):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class Delta(Answer):
    """What a chunk adds to the message."""

    role: Absent[Literal["assistant"]] = None
    content: Absent[str] = None
    reasoning_content: Absent[str] = None
    tool_calls: Absent[list[ToolCallDelta]] = None


class ChatChunkChoice(Answer):
    """One answer's part of a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None
    stop_reason: Absent[str | int] = None


class ChatChunk(Answer):
    """A chunk of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Absent[Usage] = None
    system_fingerprint: str | None = None


class CompletionLogprobs(Answer):
    """Log probabilities, as completions carry them."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One answer of a completion, or its part of a chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: Absent[str | int] = None


class TextCompletion(Answer):
    """A completion, or a chunk of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Absent[Usage] = None
    system_fingerprint: str | None = None


class Model(Answer):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "radixkv"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(Answer):
    """Every name under which a model is served."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorObject(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    """OpenAI's form of an error."""

    error: ErrorObject
