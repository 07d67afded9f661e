"""What /openapi.json says of every route: the forms of errors and of streams."""

from __future__ import annotations

from typing import Any

from radixkv_service.openai_answers import ErrorBody

__all__ = ["ADMIN_ERRORS", "ERRORS", "STREAM"]

_WHAT = {
    400: "The request cannot be answered as it is.",
    401: "No key, or none that is known.",
    404: "No such model, or route.",
    408: "The request did not come in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    421: "This Host is not served here.",
    429: "Too many requests wait; Retry-After says when to come back.",
    500: "The server failed.",
    503: "The model is being loaded, or the server shuts down; Retry-After says when to come back.",
    504: "The request's time was over.",
}

Responses = dict[int | str, dict[str, Any]]

ERRORS: Responses = {status: {"model": ErrorBody, "description": text} for status, text in _WHAT.items()}
ERRORS[422] = {"model": ErrorBody, "description": "Never sent; wrong types are 400."}
"""Errors of the routes that ask the model."""

ADMIN_ERRORS: Responses = {status: ERRORS[status] for status in (401, 421, 500, 503)}
"""Errors of the admin routes."""

STREAM: Responses = {
    200: {
        "description": "The answer; with `stream`, server-sent events that end with `data: [DONE]`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
"""A route that can stream."""
