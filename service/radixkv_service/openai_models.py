"""What OpenAI's clients send: chat completions and completions, with the extras of vLLM that we read.

Types are strict: "5" is no number. A field that is not here is ignored, and named in the header x-radixkv-ignored; one
that changes what an answer is, and that we do not offer, is refused (`refuse_unsupported`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field
from pydantic_core import PydanticCustomError

from radixkv_service.errors import unsupported

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "ContentPart",
    "FunctionCall",
    "FunctionChoice",
    "FunctionDefinition",
    "FunctionName",
    "JsonSchema",
    "ListOf",
    "Request",
    "ResponseFormat",
    "StreamOptions",
    "Tool",
    "ToolCall",
    "refuse_unsupported",
]

_STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]

T = TypeVar("T")


class _FirstOnly(FailFast):
    """FailFast that a union may hold: typing hashes what unions are of."""

    __hash__ = object.__hash__


# NOTE: without FailFast each wrong element of a list is an error of its own, for each kind that it could have been: a body
# of one megabyte then takes seconds and gigabytes. The first error is all that a client is told.
ListOf = Annotated[list[T], _FirstOnly()]
"""A list that is not read on behind its first wrong element."""

_MAX_BIASES = 1024


def _few(value: object) -> object:
    """Refuse a dict that is too long before its values are looked at: pydantic would list what is wrong with each."""
    if isinstance(value, dict) and len(value) > _MAX_BIASES:
        raise PydanticCustomError("too_long", "at most {limit} tokens may have a bias", {"limit": _MAX_BIASES})
    return value


Biases = Annotated[dict[str, float], Field(max_length=_MAX_BIASES), BeforeValidator(_few)]


class Request(BaseModel):
    """What chat and plain completions have in common."""

    model_config = _STRICT

    model: str | None = Field(None, description="A served name; none: the first one.")
    max_tokens: Count | None = Field(None, description="At most so many tokens; 0 computes the prompt only.")
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(None, description="0 and -1 keep all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Biases | None = Field(None, description="Token id, as text, -> -100 to 100.")
    min_tokens: Count | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[ListOf[str], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[ListOf[int], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Read by nobody.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Requests of one salt share prefixes with each other only."
    )
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = Field(
        None, description="Requests of one key are run close together."
    )
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = Field(None, description="Lower numbers run earlier.")
    timeout: float | None = Field(None, gt=0, description="Seconds this request may take.")

    def stops(self) -> tuple[str, ...]:
        """The stop texts; empty ones stop nothing."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)


class StreamOptions(BaseModel):
    """What a stream carries besides its text."""

    model_config = _STRICT

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="Usage in each chunk, cached_tokens from the first on.")


class ContentPart(BaseModel):
    """A part of a message; text is the only kind that is read."""

    model_config = _STRICT

    type: str
    text: str | None = None


class FunctionCall(BaseModel):
    """A function that the model called."""

    model_config = _STRICT

    name: str
    arguments: str = ""


class ToolCall(BaseModel):
    """A call of a tool, in an assistant's message."""

    model_config = _STRICT

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    """A message of a conversation."""

    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ListOf[ContentPart] | None = None
    name: str | None = None
    tool_calls: ListOf[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionDefinition(BaseModel):
    """A function that the model may call."""

    model_config = _STRICT

    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool that the model may call."""

    model_config = _STRICT

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(BaseModel):
    """A function, by its name."""

    model_config = _STRICT

    name: str


class FunctionChoice(BaseModel):
    """The one function that the model has to call."""

    model_config = _STRICT

    type: Literal["function"]
    function: FunctionName


class JsonSchema(BaseModel):
    """A schema that the answer has to obey."""

    model_config = ConfigDict(strict=True, extra="allow", populate_by_name=True)

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of the answer."""

    model_config = _STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Request):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[ListOf[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = Field(None, description="Wins over max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: ListOf[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    session_id: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None, description="Answer these messages behind those of a session; also as the header x-session-id."
    )


class CompletionRequest(Request):
    """The body of POST /v1/completions."""

    prompt: str | ListOf[str] | ListOf[int] | ListOf[ListOf[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = None
    response_format: ResponseFormat | None = None


def refuse_unsupported(body: Request) -> None:
    """Refuse what would change the answer, and is not offered.

    Raises:
        ProblemError: 400, naming the parameter.
    """
    extra: Mapping[str, Any] = body.model_extra or {}
    for name, why in _REFUSED.items():
        if extra.get(name) not in (None, False, [], ""):
            raise unsupported(name, why)
    if extra.get("modalities") not in (None, ["text"]):
        raise unsupported("modalities", "this server answers in text")
    if isinstance(body, CompletionRequest) and (body.best_of or 1) > (body.n or 1):
        raise unsupported("best_of", f"more answers than n={body.n or 1} are not made; ask for n and choose")
    if isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None:
        raise unsupported("logprobs", "a prompt's own log probabilities are not computed; leave echo out")


_REFUSED = {
    "audio": "this server answers in text",
    "suffix": "the model continues its prompt only",
    "functions": "it is OpenAI's former name; send tools",
    "function_call": "it is OpenAI's former name; send tool_choice",
    "web_search_options": "this server searches nothing",
    "prompt_logprobs": "a prompt's own log probabilities are not computed",
    "use_beam_search": "answers are drawn token by token",
}
