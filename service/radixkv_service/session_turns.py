"""A request's turn of a session: opened with its prompt, kept with its answer, undone where there is none.

open_turn ──▶ engine ──▶ keep, before the client has the answer's end
└ error, client gone, server ends ──▶ undo, before the client has the error     (TurnGuard)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from radixkv.engine.tools import ToolPrompt, tool_prompt
from radixkv.errors import SessionNotFound
from radixkv_service.auth import cache_salt_of
from radixkv_service.record import record_of
from radixkv_service.service import Service

if TYPE_CHECKING:
    from radixkv.engine.answers import ExactAnswer
    from radixkv.engine.conversation import Mark
    from radixkv.engine.output import Completion
    from radixkv.engine.turn import Turn
    from radixkv.tokens import Tokens

__all__ = ["SessionTurn", "TurnGuard", "open_turn", "owner_of", "session_id_of"]

log = logging.getLogger("radixkv.service")


def owner_of(request: Request, cache_salt: str | None) -> str:
    """Whose sessions a request may use: those of its tenant and its salt, even where tenants share their prefixes."""
    return cache_salt_of(record_of(request).tenant, cache_salt)


def session_id_of(request: Request, field: str | None) -> str | None:
    """The session that a request belongs to: its field, else its header x-session-id."""
    return field if field is not None else request.headers.get("x-session-id")


class SessionTurn:
    """An open turn of a session.

    Attributes:
        turn: with the prompt.
    """

    def __init__(self, service: Service, turn: Turn) -> None:
        self._splicer = service.transcripts.splicer
        self.turn = turn

    @property
    def ids(self) -> Tokens:
        """The prompt."""
        return self.turn.prompt.ids

    @property
    def shown(self) -> ToolPrompt:
        """The whole conversation, as the template reads it."""
        return ToolPrompt(self.turn.said, list(self.turn.tools) if self.turn.tools else None)

    def keep(self, answer: Mapping[str, Any], completion: Completion) -> ExactAnswer:
        """End the turn with its answer; one without a token (max_tokens=0) leaves the session as it was.

        Where the session was closed meanwhile, its client has the answer all the same. Cost: O(characters of the messages).

        Args:
            answer: the assistant's message, as the template reads it.
            completion: the answer.
        """
        if completion.token_ids:
            try:
                return self.turn.keep(answer, completion)
            except SessionNotFound:
                log.info("a session was closed before its answer came")
        self.turn.undo()
        return self._splicer.exact(completion)

    def undo(self) -> None:
        """Leave the session as it was before, unless the answer was kept."""
        self.turn.undo()


def open_turn(
    service: Service,
    request: Request,
    session_id: str,
    cache_salt: str | None,
    messages: Sequence[Mapping[str, Any]],
    marks: Sequence[Mark] = (),
) -> SessionTurn:
    """Open a turn that ends with the request, however that ends. Takes time: not for the event loop.

    Args:
        service: with the sessions.
        request: whose middleware `TurnGuard` undoes the turn if nothing else ends it.
        session_id: of the session.
        cache_salt: of the request.
        messages: what is said now, in OpenAI's form.
        marks: places in these messages.

    Raises:
        SessionNotFound: no such session of this owner. SessionBusy: a turn of it is open.
        EngineError, ConfigError: the template refuses the messages.
    """
    said = tool_prompt(service.engine.tokenizer, messages).messages
    owner = owner_of(request, cache_salt)
    turn = SessionTurn(service, service.sessions.turn(session_id, owner, said))
    request.state.turn = turn
    if marks:
        opened = turn.turn
        before = len(opened.said) - len(said)
        places = [(before + index, part) for index, part in marks]
        splicer = service.transcripts.splicer
        opened.prompt = splicer.prompt(opened.said, opened.known, tools=opened.tools, namespace=owner, marks=places)
    return turn


class TurnGuard:
    """ASGI middleware around everything: a request's turn does not outlive it.

    Args:
        app: the gate, and the routes behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request through. An error is sent only after the undo, so that its client can ask again at once."""

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                undo()
            await send(message)

        def undo() -> None:
            turn = scope.get("state", {}).get("turn")
            if isinstance(turn, SessionTurn):
                turn.undo()

        try:
            await self.app(scope, receive, reply)
        finally:
            undo()
