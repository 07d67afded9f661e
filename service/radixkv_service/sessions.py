"""/v1/sessions: conversations that the server keeps, so that a turn sends its new messages only. docs/sessions.md says more.

open ─▶ chat completions and Messages with session_id ... ─▶ fork, rewind, append ─▶ close, or ttl_s without use
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from radixkv.engine.tools import tool_prompt
from radixkv.errors import EngineError, TooManySessions
from radixkv_service.dialog import messages_of
from radixkv_service.documents import ERRORS
from radixkv_service.errors import Problem, ProblemError, bad_request
from radixkv_service.generation import service_of
from radixkv_service.openai_models import ChatMessage
from radixkv_service.prompt_limits import refuse_long_messages
from radixkv_service.service import Service
from radixkv_service.session_models import (
    AppendMessages,
    ClosedSession,
    CloseSession,
    OpenSession,
    RewindSession,
    SessionList,
    SessionView,
    WholeSession,
)
from radixkv_service.session_turns import owner_of
from radixkv_service.surrogates import clean_json

if TYPE_CHECKING:
    from radixkv.engine.session_store import SessionInfo

__all__ = [
    "append_messages",
    "close_session",
    "delete_session",
    "fork_session",
    "get_session",
    "list_sessions",
    "new_session",
    "open_session",
    "rewind_session",
    "router",
]

router = APIRouter(tags=["sessions"])
T = TypeVar("T")

_MAX_SALT = 256


@router.post("/v1/sessions", response_model=SessionView, responses=ERRORS)
async def new_session(request: Request, body: OpenSession | None = None) -> SessionView:
    """Open a session."""
    service = service_of(request)
    body = body or OpenSession.model_validate({})
    owner = owner_of(request, body.cache_salt if body.cache_salt is not None else _salt(request))
    system = [ChatMessage(role="system", content=body.system)] if body.system is not None else []
    said = await _checked(service, [*system, *body.messages])
    session_id = await _limited(partial(service.sessions.open, owner, said, ttl_s=body.ttl_s))
    return _view(service.sessions.info(session_id, owner))


@router.get("/v1/sessions", response_model=SessionList, responses=ERRORS)
async def list_sessions(request: Request) -> SessionList:
    """The owner's sessions: those of the key's tenant and the header x-cache-salt."""
    sessions = service_of(request).sessions.sessions(_owner(request))
    return SessionList(data=[_view(one) for one in sessions])


@router.get("/v1/sessions/{session_id}", response_model=WholeSession, responses=ERRORS)
async def get_session(session_id: str, request: Request) -> WholeSession:
    """A session and its messages; asking for it is a use of it."""
    service, owner = service_of(request), _owner(request)
    messages = service.sessions.messages(session_id, owner)
    view = _view(service.sessions.info(session_id, owner))
    num_tokens = await asyncio.to_thread(_num_tokens, service, owner, messages)
    return WholeSession(**view.model_dump(), num_tokens=num_tokens, messages=clean_json(messages))


@router.post("/v1/sessions/{session_id}/messages", response_model=SessionView, responses=ERRORS)
async def append_messages(session_id: str, body: AppendMessages, request: Request) -> SessionView:
    """Add messages to what the next turn says, and generate nothing yet."""
    service, owner = service_of(request), _owner(request)
    said = await _checked(service, body.messages)
    await asyncio.to_thread(service.sessions.append, session_id, owner, said)
    return _view(service.sessions.info(session_id, owner))


@router.post("/v1/sessions/{session_id}/fork", response_model=SessionView, responses=ERRORS)
async def fork_session(session_id: str, request: Request) -> SessionView:
    """Open another session with the same past."""
    service, owner = service_of(request), _owner(request)
    other = await _limited(partial(service.sessions.fork, session_id, owner))
    return _view(service.sessions.info(other, owner))


@router.post("/v1/sessions/{session_id}/rewind", response_model=SessionView, responses=ERRORS)
async def rewind_session(session_id: str, request: Request, body: RewindSession | None = None) -> SessionView:
    """Undo the last turns, and what was added since."""
    service, owner = service_of(request), _owner(request)
    turns = 1 if body is None else body.turns
    service.sessions.rewind(session_id, owner, turns)
    return _view(service.sessions.info(session_id, owner))


@router.delete("/v1/sessions/{session_id}", response_model=ClosedSession, responses=ERRORS)
async def delete_session(session_id: str, request: Request) -> ClosedSession:
    """End a session; an answer that is being made for it is still sent, and not kept."""
    service_of(request).sessions.close(session_id, _owner(request))
    return ClosedSession(id=session_id)


@router.post("/open_session", response_model=str, responses=ERRORS, tags=["SGLang"])
async def open_session(request: Request, body: dict[str, Any] | None = None) -> Response:
    """Open an empty session, by SGLang's name and with its answer: the id as a JSON text."""
    if body and body.get("session_id") is not None:
        raise bad_request("session_id: ids are made here, so that nobody can guess them; leave it out", "session_id")
    service = service_of(request)
    return JSONResponse(await _limited(partial(service.sessions.open, _owner(request))))


@router.post("/close_session", response_class=Response, responses=ERRORS, tags=["SGLang"])
async def close_session(body: CloseSession, request: Request) -> Response:
    """End a session, by SGLang's name."""
    service_of(request).sessions.close(body.session_id, _owner(request))
    return Response(status_code=200)


def _salt(request: Request) -> str | None:
    salt = request.headers.get("x-cache-salt")
    if salt is not None and not 0 < len(salt) <= _MAX_SALT:
        raise bad_request(f"x-cache-salt: 1 to {_MAX_SALT} characters", "x-cache-salt")
    return salt


def _owner(request: Request) -> str:
    return owner_of(request, _salt(request))


async def _checked(service: Service, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as the template is to read them, calls and results of tools included.

    Raises:
        ProblemError: more than any prompt holds.
    """

    def read() -> list[dict[str, Any]]:
        plain = messages_of(messages)
        refuse_long_messages(service, plain)
        return tool_prompt(service.engine.tokenizer, plain).messages

    return await asyncio.to_thread(read)


async def _limited(open_one: Callable[[], T]) -> T:
    """What opens a session; too many are the client's to wait for.

    Raises:
        ProblemError: 429, as many are open as may be.
    """
    try:
        return await asyncio.to_thread(open_one)
    except TooManySessions as error:
        headers = {"retry-after": "60"}
        problem = Problem(429, "rate_limit_error", str(error), None, "too_many_sessions", headers)
        raise ProblemError(problem) from error


def _num_tokens(service: Service, owner: str, messages: Sequence[dict[str, Any]]) -> int | None:
    if not messages:
        return 0
    try:
        return len(service.transcripts.prompt_ids(messages, namespace=owner).ids)
    except EngineError:
        return None


def _view(info: SessionInfo) -> SessionView:
    return SessionView(
        id=info.session_id,
        num_messages=info.num_messages,
        num_turns=info.num_turns,
        busy=info.busy,
        ttl_s=info.ttl_s,
        expires_in_s=info.expires_in_s,
    )
