"""What goes wrong, as HTTP: one table from the engine's errors to statuses, and each API's own form of an error.

RadixKVError, a bad body, no key, too large ──▶ Problem(status, type, message, param, code) ──▶ OpenAI's error object
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from radixkv import errors as core

__all__ = [
    "Problem",
    "ProblemError",
    "bad_request",
    "clean",
    "problem_of",
    "problem_of_status",
    "problem_of_validation",
    "unsupported",
]

_INVALID = "invalid_request_error"

_TABLE: tuple[tuple[type[Exception], int, str, str], ...] = (
    (core.QueueFull, 429, "rate_limit_error", "queue_full"),
    (core.QuotaExceeded, 429, "rate_limit_error", "quota_exceeded"),
    (core.TooManySessions, 429, "rate_limit_error", "too_many_sessions"),
    (core.DeadlineExceeded, 504, "timeout_error", "deadline_exceeded"),
    (core.EngineClosed, 503, "service_unavailable_error", "engine_closed"),
    (core.PoolExhausted, 503, "service_unavailable_error", "pool_exhausted"),
    (core.RequestInterrupted, 503, "service_unavailable_error", "interrupted"),
    (core.PromptTooLong, 400, _INVALID, "context_length_exceeded"),
    (core.RequestTooLarge, 400, _INVALID, "request_too_large"),
    (core.ChatTemplateMissing, 400, _INVALID, "chat_template_missing"),
    (core.RepositoryError, 400, _INVALID, "invalid_repository"),
    (core.StructureError, 400, _INVALID, "unsupported_structure"),
    (core.TokenError, 400, _INVALID, "invalid_tokens"),
    (core.ConfigError, 400, _INVALID, "invalid_value"),
    (core.NamespaceError, 400, _INVALID, "invalid_value"),
    (core.SessionNotFound, 404, _INVALID, "session_not_found"),
    (core.SessionBusy, 409, _INVALID, "session_busy"),
    (core.SessionClosed, 409, _INVALID, "session_closed"),
)
"""The first row that fits counts; what fits none is our own fault: 500."""

_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a client gets it.

    Attributes:
        status: of HTTP.
        kind: OpenAI's `type`.
        message: what was asked, what is true, what to do.
        param: the field that is wrong, if one is.
        code: a short name that programs compare.
        headers: of the response, besides the usual ones.
    """

    status: int
    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        param = None if self.param is None else clean(self.param)
        return {"error": {"message": clean(self.message), "type": self.kind, "param": param, "code": self.code}}

    def encode(self) -> bytes:
        """The body as JSON."""
        return json.dumps(self.body()).encode()


class ProblemError(Exception):
    """A problem on its way to the client."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ProblemError:
    """A request that cannot be answered as it is."""
    return ProblemError(Problem(400, _INVALID, message, param, code))


def unsupported(param: str, why: str) -> ProblemError:
    """A parameter of the API that this server knows, and does not offer."""
    return bad_request(f"{param} is not supported: {why}", param, "unsupported_parameter")


def problem_of(error: BaseException) -> Problem:
    """The problem that an error is. What nobody expected says nothing of itself to the client."""
    if isinstance(error, ProblemError):
        return error.problem
    for kind, status, name, code in _TABLE:
        if isinstance(error, kind):
            return Problem(status, name, str(error), _param(error), code, _headers(error, status))
    if type(error) is core.EngineError:  # a chat template that refuses the messages
        return Problem(400, _INVALID, str(error), "messages", "template_refused")
    if isinstance(error, RecursionError):
        return Problem(400, _INVALID, "the request is nested too deeply; send a flatter one", None, "too_deep")
    return Problem(500, "server_error", "the server failed on this request; its log has the reason", None, "internal_error")


def _param(error: Exception) -> str | None:
    if isinstance(error, core.ConfigError):
        return _PARAMS.get(str(error.fields.get("setting")), str(error.fields.get("setting")))
    return "prompt" if isinstance(error, (core.TokenError, core.PromptTooLong)) else None


_PARAMS = {"deadline_s": "timeout", "structure": "response_format"}
"""Settings of the engine whose field in a request has another name."""


def _headers(error: Exception, status: int) -> dict[str, str]:
    if status not in (429, 503):
        return {}
    wait_s = error.retry_after_s if isinstance(error, core.QueueFull) else _RETRY_S
    return {"retry-after": str(max(math.ceil(wait_s), 1))}


def clean(text: str) -> str:
    """The text without what UTF-8 cannot hold: JSON may bring lone surrogates."""
    return text.encode("utf-8", "replace").decode()


def problem_of_status(status: int, detail: str) -> Problem:
    """The problem that a bare status is: routes that do not exist, methods that are not allowed."""
    kind = _INVALID if status < 500 else "server_error"
    return Problem(status, kind, detail, None, HTTPStatus(status).name.lower())


def problem_of_validation(errors: Sequence[Mapping[str, Any]], body: object = None) -> Problem:
    """The first thing that is wrong with a body: OpenAI names one parameter.

    Args:
        errors: as pydantic lists them.
        body: what they are about; where a place names the kinds that a value could have been, it says what is a key.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        message = f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        return Problem(400, _INVALID, message, code="bad_json")
    places = [(_place(one["loc"], body), one) for one in errors]
    alike = [pair for pair in places if pair[0][:1] == places[0][0][:1]]  # of every kind the value could have been
    where, first = max(alike, key=lambda pair: len(pair[0]))
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".") or None
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_type"
    return Problem(400, _INVALID, f"{param or 'the body'}: {first['msg']}", param, code)


def _place(loc: Sequence[str | int], body: object) -> list[str | int]:
    """The keys and indices of a place, without the names of kinds between them."""
    place: list[str | int] = []
    value = body
    for index, part in enumerate(loc):
        if part in ("body", "query", "path", "header") and index == 0:
            continue
        if _has(value, part):
            value = value[part]  # type: ignore[index]
        elif not (isinstance(value, dict) and index == len(loc) - 1) and place:
            continue
        place.append(part)
    return place


def _has(value: object, part: str | int) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)
