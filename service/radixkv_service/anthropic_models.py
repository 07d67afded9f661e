"""What Anthropic's clients send to POST /v1/messages and to its token counter.

Types are strict, as on OpenAI's routes: a field that nobody reads is named in x-radixkv-ignored, one that would change the
answer and is not offered is refused. What a block may hold depends on its type; `anthropic_dialog` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from radixkv_service.errors import unsupported
from radixkv_service.openai_models import ListOf, Request

__all__ = [
    "Block",
    "CacheControl",
    "CountTokensRequest",
    "InputMessage",
    "InputTool",
    "MessagesInput",
    "MessagesRequest",
    "Metadata",
    "OutputConfig",
    "OutputFormat",
    "Thinking",
    "ToolChoice",
    "as_request",
    "refuse_unoffered",
]

_STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=(), populate_by_name=True)

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


class CacheControl(BaseModel):
    """A breakpoint: what comes before it is worth keeping, for so long after its last use."""

    model_config = _STRICT

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = Field(None, description="5m unless given.")


class Block(BaseModel):
    """A part of a message or of the system prompt: text, tool_use, tool_result or thinking."""

    model_config = _STRICT

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | ListOf[Block] | None = None
    is_error: bool | None = None
    thinking: str | None = None
    cache_control: CacheControl | None = None


class InputMessage(BaseModel):
    """A message of a conversation."""

    model_config = _STRICT

    role: Literal["user", "assistant", "system"]
    content: str | ListOf[Block]


class InputTool(BaseModel):
    """A tool that the model may call and the client runs."""

    model_config = _STRICT

    name: Annotated[str, Field(min_length=1, max_length=128)]
    type: str | None = Field(None, description="custom, or left out; tools that a server runs are not offered.")
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    cache_control: CacheControl | None = None


class ToolChoice(BaseModel):
    """Whether and which tool is called."""

    model_config = _STRICT

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(BaseModel):
    """What to do with the model's thinking: `disabled` leaves it out of the answer, anything else shows it."""

    model_config = _STRICT

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = Field(None, description="Read by nobody.")


class Metadata(BaseModel):
    """About the request."""

    model_config = _STRICT

    user_id: str | None = Field(None, description="Read by nobody.")


class OutputFormat(BaseModel):
    """A schema that the answer has to obey."""

    model_config = _STRICT

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    """The form of the answer."""

    model_config = _STRICT

    format: OutputFormat | None = None
    effort: str | None = Field(None, description="Read by nobody.")


class MessagesInput(BaseModel):
    """What asking and counting have in common: all that a prompt is made of."""

    model_config = _STRICT

    model: str | None = Field(None, description="A served name; none: the first one.")
    messages: Annotated[ListOf[InputMessage], Field(min_length=1)]
    system: str | ListOf[Block] | None = None
    tools: ListOf[InputTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = Field(None, description="A breakpoint behind the last message.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Requests of one salt share prefixes with each other only."
    )
    session_id: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None, description="Answer these messages behind those of a session; also as the header x-session-id."
    )


class CountTokensRequest(MessagesInput):
    """The body of POST /v1/messages/count_tokens."""


class MessagesRequest(MessagesInput):
    """The body of POST /v1/messages."""

    max_tokens: Count = Field(description="At most so many tokens; 0 computes the prompt only.")
    stop_sequences: Annotated[ListOf[str], Field(max_length=64)] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Count | None = Field(None, description="0 keeps all tokens.")
    metadata: Metadata | None = None
    service_tier: str | None = Field(None, description="Read by nobody.")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = Field(None, description="Lower numbers run earlier.")
    timeout: float | None = Field(None, gt=0, description="Seconds this request may take.")


_AS_THEY_ARE = ("temperature", "top_p", "top_k", "seed", "priority", "timeout", "cache_salt")


def as_request(body: MessagesRequest) -> Request:
    """The fields of a request that OpenAI's routes know too, and the names of those that nobody reads."""
    request = Request(**{name: getattr(body, name) for name in _AS_THEY_ARE}, stop=body.stop_sequences)
    request.__pydantic_extra__ = dict(body.model_extra or {})
    return request


def refuse_unoffered(body: MessagesInput) -> None:
    """Refuse what would change the answer, and is not offered.

    Raises:
        ProblemError: 400, naming the parameter.
    """
    extra: Mapping[str, Any] = body.model_extra or {}
    for name, why in _REFUSED.items():
        if extra.get(name) not in (None, False, [], {}, ""):
            raise unsupported(name, why)


_REFUSED = {
    "container": "this server runs no code",
    "mcp_servers": "this server calls no others; give their tools in `tools`, and run them yourself",
    "context_management": "nothing of a conversation is left out here",
    "output_format": "it is the former name of output_config.format",
}
