"""The API's JSON as values; what is in another form raises `BadAnswer`, what the server refuses `ApiError`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from radixkv_client.errors import ApiError, BadAnswer, StreamBroken

__all__ = [
    "ChatChunk",
    "Health",
    "Model",
    "Usage",
    "api_error",
    "chat_chunk",
    "health_of",
    "models_of",
    "stream_error",
    "whole_chat",
]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request.

    Attributes:
        prompt_tokens: of the prompt, cached ones included.
        completion_tokens: of the answer.
        cached_tokens: of the prompt, those that were not computed.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class ChatChunk:
    """A part of a chat answer.

    Attributes:
        text: what it adds; often "".
        finish_reason: why the answer ended, in the chunk that ends it.
        usage: in the last chunk, if it was asked for.
        index: of the answer, where several were asked for.
    """

    text: str
    finish_reason: str | None = None
    usage: Usage | None = None
    index: int = 0


@dataclass(frozen=True, slots=True)
class Health:
    """Where the server is in its life: "loading", "ok", "draining" or "failed"."""

    status: str

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self.status == "ok"


@dataclass(frozen=True, slots=True)
class Model:
    """A name under which a model is served.

    Attributes:
        id: the name.
        max_model_len: the longest prompt plus answer, in tokens; None where the server does not say.
    """

    id: str
    max_model_len: int | None


def health_of(url: str, body: bytes) -> Health:
    """Read the answer of /health.

    Raises:
        BadAnswer: it is none.
    """
    status = _object(url, body).get("status")
    if not isinstance(status, str):
        raise BadAnswer(url, "its health has no status")
    return Health(status)


def models_of(url: str, body: bytes) -> list[Model]:
    """Read the answer of /v1/models.

    Raises:
        BadAnswer: it is none.
    """
    data = _object(url, body).get("data")
    if not isinstance(data, list) or not all(isinstance(one, dict) and isinstance(one.get("id"), str) for one in data):
        raise BadAnswer(url, "its list of models has no names")
    return [Model(one["id"], _count(one, "max_model_len", None)) for one in data]


def whole_chat(url: str, body: bytes) -> ChatChunk:
    """Read a chat answer that was not streamed, as one chunk.

    Raises:
        BadAnswer: it is none.
    """
    return _chunk(_object(url, body), "message", url)


def chat_chunk(data: str) -> ChatChunk:
    """Read an event of a streamed chat answer.

    Raises:
        ApiError: the server failed in the middle. StreamBroken: it is no chunk.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise StreamBroken("an event is no JSON") from error
    if not isinstance(value, dict):
        raise StreamBroken("an event is no object")
    if "error" in value:
        raise stream_error(data)
    try:
        return _chunk(value, "delta", "")
    except BadAnswer as error:
        raise StreamBroken(error.reason) from error


def stream_error(data: str) -> ApiError:
    """The error that a stream ended with."""
    return _error_of(200, data, None)


def api_error(status: int, body: bytes, retry_after_s: float | None) -> ApiError:
    """The error that a refused request was answered with, whatever its form."""
    return _error_of(status, body.decode("utf-8", "replace"), retry_after_s)


def _error_of(status: int, text: str, retry_after_s: float | None) -> ApiError:
    try:
        error = json.loads(text)["error"]
        kind, message, code = error.get("type"), error.get("message"), error.get("code")
    except (ValueError, LookupError, TypeError, AttributeError):  # a proxy's page, most likely
        kind, message, code = None, None, None
    if not isinstance(message, str) or not message:
        message = " ".join(text.split())[:200] or "it gave no reason"
    return ApiError(
        status,
        kind if isinstance(kind, str) else "",
        message,
        code=code if isinstance(code, str) else "",
        retry_after_s=retry_after_s,
    )


def _chunk(value: Mapping[str, Any], part: str, url: str) -> ChatChunk:
    choices, usage = value.get("choices"), value.get("usage")
    if not isinstance(choices, list):
        raise BadAnswer(url, "an answer has no choices")
    text, reason, index = "", None, 0
    if choices:
        choice = choices[0]
        said = choice.get(part) if isinstance(choice, dict) else None
        if not isinstance(said, dict):
            raise BadAnswer(url, f"a choice has no {part}")
        content, reason = said.get("content"), choice.get("finish_reason")
        text = content if isinstance(content, str) else ""
        reason = reason if isinstance(reason, str) else None
        index = _count(choice, "index", 0) or 0
    return ChatChunk(text, reason, _usage(usage) if isinstance(usage, dict) else None, index)


def _usage(value: Mapping[str, Any]) -> Usage:
    details = value.get("prompt_tokens_details")
    cached = _count(details, "cached_tokens", 0) if isinstance(details, dict) else 0
    return Usage(_count(value, "prompt_tokens", 0) or 0, _count(value, "completion_tokens", 0) or 0, cached or 0)


def _count(value: Mapping[str, Any], name: str, default: int | None) -> int | None:
    found = value.get(name)
    return found if isinstance(found, int) and not isinstance(found, bool) else default


def _object(url: str, body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError as error:
        raise BadAnswer(url, "its answer is no JSON") from error
    if not isinstance(value, dict):
        raise BadAnswer(url, "its answer is no object")
    return value
