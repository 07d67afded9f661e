"""Bodies and answers of the session routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from radixkv_service.openai_answers import Answer
from radixkv_service.openai_models import ChatMessage, ListOf

__all__ = [
    "AppendMessages",
    "CloseSession",
    "ClosedSession",
    "OpenSession",
    "RewindSession",
    "SessionList",
    "SessionView",
    "WholeSession",
]

_MAX_FIELDS = 64


class _Body(BaseModel):
    """A body that has no other fields than ours."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, value: object) -> object:
        """Refuse a crowd of fields as one error; pydantic makes one for each."""
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise PydanticCustomError("too_long", "at most {limit} fields are read", {"limit": _MAX_FIELDS})
        return value


class OpenSession(_Body):
    """The body of POST /v1/sessions."""

    system: str | None = Field(None, description="A system message, in front of the others.")
    messages: ListOf[ChatMessage] = Field([], description="What is said before the first turn.")
    ttl_s: Annotated[float, Field(ge=1, le=30 * 86_400)] = Field(3600.0, description="Seconds without use until it is gone.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Only requests of this salt find it; also as the header x-cache-salt."
    )


class AppendMessages(_Body):
    """The body of POST /v1/sessions/{session_id}/messages."""

    messages: Annotated[ListOf[ChatMessage], Field(min_length=1)]


class RewindSession(_Body):
    """The body of POST /v1/sessions/{session_id}/rewind."""

    turns: Annotated[int, Field(ge=0, le=2**31 - 1)] = Field(1, description="So many of the last turns are undone.")


class CloseSession(BaseModel):
    """The body of POST /close_session, SGLang's name."""

    model_config = ConfigDict(strict=True, extra="ignore")

    session_id: Annotated[str, Field(min_length=1, max_length=128)]


class SessionView(Answer):
    """A session's numbers."""

    id: str
    object: Literal["session"] = "session"
    num_messages: int
    num_turns: int
    busy: bool
    ttl_s: float
    expires_in_s: float


class WholeSession(SessionView):
    """A session with its messages; `num_tokens` is what they are as a prompt, None where the template refuses them."""

    num_tokens: int | None
    messages: list[dict[str, Any]]


class SessionList(Answer):
    """The sessions of one owner, oldest first."""

    object: Literal["list"] = "list"
    data: list[SessionView]


class ClosedSession(Answer):
    """A session that is gone."""

    id: str
    object: Literal["session"] = "session"
    deleted: Literal[True] = True
