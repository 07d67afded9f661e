"""Conversations that the server keeps, for clients that would rather send a turn than the history.

    open ──▶ idle ── turn ──▶ busy ── keep ──▶ idle with one turn more          close, or ttl_s without use ──▶ gone
                                └──── undo ──▶ idle as before

A session is messages and the exact ids of the answers among them; it knows nothing of pages or leases. The prompt of its
next turn is the one that its messages would have if a client resent them all.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import inf
from threading import Lock
from time import monotonic
from typing import Any

from radixkv.engine.answers import ExactAnswer
from radixkv.engine.config import is_count, is_number
from radixkv.engine.conversation import Mark
from radixkv.engine.tokenizer import Message
from radixkv.engine.transcripts import Transcripts
from radixkv.engine.turn import SessionState, Turn, copied, num_chars
from radixkv.errors import ConfigError, SessionBusy, SessionNotFound, SessionTooLong, TooManySessions
from radixkv.namespace import Namespace

__all__ = ["SessionInfo", "SessionStore"]


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as its owner sees it.

    Attributes:
        session_id: names it.
        num_messages: messages in it.
        num_turns: finished turns.
        busy: whether a turn is open.
        ttl_s: seconds without use after which it is gone.
        expires_in_s: seconds left of them.
    """

    session_id: str
    num_messages: int
    num_turns: int
    busy: bool
    ttl_s: float
    expires_in_s: float


class SessionStore:
    """Sessions by their ids, each of one namespace; in another namespace its id names nothing.

    Args:
        transcripts: where answers of sessions are remembered too, so that their history may as well be resent as messages.
        max_sessions: at most so many at once.
        max_per_tenant: at most so many of one tenant; None: as many as there may be.
        tenant_of: whose a namespace is; without it, each is a tenant of its own.
        max_chars: of the messages of one session, names of fields included; None: no limit.
        clock: seconds that only grow.

    Attributes:
        transcripts: those.

    Sessions expire when something is asked of the store, and in `expire`; nothing runs by itself. One that is busy does not.

    Thread safety: any thread may call anything; nothing is rendered or tokenised under the lock.

    Raises:
        ConfigError: a limit below 1.
    """

    def __init__(
        self,
        transcripts: Transcripts,
        *,
        max_sessions: int = 1024,
        max_per_tenant: int | None = None,
        tenant_of: Callable[[str | Namespace], object] | None = None,
        max_chars: int | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        per_tenant = max_sessions if max_per_tenant is None else max_per_tenant
        limits = {"max_sessions": max_sessions, "max_per_tenant": per_tenant, "max_chars": max_chars}
        for name, value in limits.items():
            if value is not None and not (is_count(value) and value >= 1):
                raise ConfigError(name, value, "a whole number, at least 1")
        self.transcripts = transcripts
        self._max_sessions, self._max_per_tenant, self._max_chars = max_sessions, per_tenant, max_chars
        self._tenant_of = tenant_of if tenant_of is not None else _key
        self._clock = clock
        self._sessions: dict[str, SessionState] = {}
        self._lock = Lock()

    def open(
        self,
        namespace: str | Namespace = "",
        messages: Sequence[Message] = (),
        *,
        tools: Sequence[Any] | None = None,
        ttl_s: float = 3600.0,
    ) -> str:
        """Open a session.

        Args:
            namespace: whose it is.
            messages: what is said before its first turn; answers that are remembered keep their ids.
            tools: functions or schemas that the template shows to the model in every turn.
            ttl_s: seconds without use after which it is gone.

        Returns:
            Its id: 32 characters that nobody can guess.

        Raises:
            TooManySessions: as many are open as may be. SessionTooLong: more text than a session may hold.
            ConfigError: ttl_s not above 0, or a content that is no text.
        """
        if not (is_number(ttl_s) and 0 < ttl_s < inf):
            raise ConfigError("ttl_s", ttl_s, "seconds, more than 0")
        said = copied(messages)
        chars = self._fitting(0, said)
        tenant = self._tenant_of(namespace)
        session = SessionState(_key(namespace), tenant, said, deepcopy(tools), ttl_s, settled=len(said), chars=chars)
        session.known = self.transcripts.known(said, tools=tools, namespace=namespace)
        with self._lock:
            return self._enter(session)

    def append(self, session_id: str, namespace: str | Namespace, messages: Sequence[Message]) -> None:
        """Add messages that belong to the next turn, such as the results of tools.

        Raises:
            SessionNotFound: there is none of this id in this namespace. SessionBusy: a turn is open.
            SessionTooLong: more text than a session may hold. ConfigError: a content that is no text.
        """
        said = copied(messages)
        with self._lock:
            session = self._idle(session_id, namespace)
            session.chars = self._fitting(session.chars, said)
            session.messages += said

    def turn(
        self,
        session_id: str,
        namespace: str | Namespace = "",
        messages: Sequence[Message] = (),
        *,
        marks: Sequence[Mark] = (),
    ) -> Turn:
        """Open a turn: its prompt is made, and an answer may be kept.

        Args:
            session_id: of the session.
            namespace: of the session.
            messages: what is said now; gone again if the turn is undone.
            marks: as for `Splicer.prompt`; indexes count from the first message of the session.

        Raises:
            SessionNotFound: there is none of this id in this namespace. SessionBusy: a turn is open.
            SessionTooLong: more text than a session may hold.
            EngineError, ConfigError: as `Splicer.prompt`; the session is as before.
        """
        said = copied(messages)
        with self._lock:
            session = self._idle(session_id, namespace)
            chars = self._fitting(session.chars, said)
            turn = Turn(self, session_id, namespace, [*session.messages, *said], session.tools, chars)
            session.turn, known = turn, dict(session.known)
        try:
            turn.known = {**self.transcripts.known(turn.said, tools=turn.tools, namespace=namespace), **known}
            turn.prompt = self.transcripts.splicer.prompt(
                turn.said, turn.known, tools=turn.tools, namespace=namespace, marks=marks
            )
        except BaseException:
            turn.undo()
            raise
        return turn

    def fork(self, session_id: str, namespace: str | Namespace = "") -> str:
        """Open another session with the same past; returns its id. Cost: O(messages), no ids are copied.

        Raises:
            SessionNotFound: there is none of this id in this namespace. SessionBusy: a turn is open.
            TooManySessions: as many are open as may be.
        """
        with self._lock:
            one = self._idle(session_id, namespace)
            other = SessionState(one.namespace, one.tenant, list(one.messages), one.tools, one.ttl_s, settled=one.settled)
            other.chars = one.chars
            other.known, other.turns = dict(one.known), list(one.turns)
            return self._enter(other)

    def rewind(self, session_id: str, namespace: str | Namespace = "", turns: int = 1) -> None:
        """Undo the last turns, and what was appended since, to say something else instead.

        Raises:
            SessionNotFound: there is none of this id in this namespace. SessionBusy: a turn is open.
            ConfigError: fewer turns were taken.
        """
        with self._lock:
            session = self._idle(session_id, namespace)
            if not (is_count(turns) and 0 <= turns <= len(session.turns)):
                raise ConfigError("turns", turns, f"0 to {len(session.turns)}, the turns taken")
            if turns:
                session.settled = session.turns[-turns]
                del session.messages[session.settled :], session.turns[-turns:]
                session.chars = num_chars(session.messages)
                session.known = {i: exact for i, exact in session.known.items() if i < session.settled}

    def messages(self, session_id: str, namespace: str | Namespace = "") -> list[dict[str, Any]]:
        """The conversation up to now, without an open turn; a copy.

        Raises:
            SessionNotFound: there is none of this id in this namespace.
        """
        with self._lock:
            said = list(self._find(session_id, namespace).messages)
        return deepcopy(said)

    def info(self, session_id: str, namespace: str | Namespace = "") -> SessionInfo:
        """A session's numbers; asking does not lengthen its life.

        Raises:
            SessionNotFound: there is none of this id in this namespace.
        """
        with self._lock:
            return self._info(session_id, self._find(session_id, namespace, used=False))

    def sessions(self, namespace: str | Namespace = "") -> list[SessionInfo]:
        """The sessions of a namespace, oldest first."""
        key = _key(namespace)
        with self._lock:
            self._expire(self._clock())
            return [self._info(name, session) for name, session in self._sessions.items() if session.namespace == key]

    def close(self, session_id: str, namespace: str | Namespace = "") -> None:
        """End a session. An open turn of it can still be answered, but not be kept.

        Raises:
            SessionNotFound: there is none of this id in this namespace.
        """
        with self._lock:
            self._find(session_id, namespace)
            del self._sessions[session_id]

    def expire(self, now_s: float | None = None) -> int:
        """Drop the sessions whose time is over; returns how many. `now_s` is the clock's time unless given."""
        with self._lock:
            return self._expire(self._clock() if now_s is None else now_s)

    def __len__(self) -> int:
        """How many sessions are open, those of all namespaces."""
        return len(self._sessions)

    def _fitting(self, chars: int, said: Sequence[Message]) -> int:
        """Characters of a session with some more messages, if it may have them."""
        chars += num_chars(said)
        if self._max_chars is not None and chars > self._max_chars:
            raise SessionTooLong(chars, self._max_chars)
        return chars

    # -- under the lock -----------------------------------------------------------------------------------------------

    def _enter(self, session: SessionState) -> str:
        now_s = self._clock()
        self._expire(now_s)
        own = sum(other.tenant == session.tenant for other in self._sessions.values())
        if own >= self._max_per_tenant:
            raise TooManySessions(own, self._max_per_tenant)
        if len(self._sessions) >= self._max_sessions:
            raise TooManySessions(len(self._sessions), self._max_sessions)
        session.expires_s = now_s + session.ttl_s
        session_id = secrets.token_urlsafe(24)
        self._sessions[session_id] = session
        return session_id

    def _expire(self, now_s: float) -> int:
        over = [name for name, session in self._sessions.items() if session.turn is None and session.expires_s <= now_s]
        for name in over:
            del self._sessions[name]
        return len(over)

    def _find(self, session_id: str, namespace: str | Namespace, *, used: bool = True) -> SessionState:
        now_s, key = self._clock(), _key(namespace)
        session = self._sessions.get(session_id)
        if session is not None and session.turn is None and session.expires_s <= now_s:
            del self._sessions[session_id]
            session = None
        if session is None or session.namespace != key:
            raise SessionNotFound(session_id)
        if used:
            session.expires_s = now_s + session.ttl_s
        return session

    def _idle(self, session_id: str, namespace: str | Namespace) -> SessionState:
        session = self._find(session_id, namespace)
        if session.turn is not None:
            raise SessionBusy
        return session

    def _info(self, session_id: str, session: SessionState) -> SessionInfo:
        left_s = max(session.expires_s - self._clock(), 0.0)
        busy = session.turn is not None
        return SessionInfo(session_id, len(session.messages), len(session.turns), busy, session.ttl_s, left_s)

    def _finish(self, turn: Turn, answer: dict[str, Any], exact: ExactAnswer) -> None:
        with self._lock:
            session = self._find(turn.session_id, turn.namespace)
            if session.turn is not turn:
                raise SessionBusy
            session.messages, session.chars = [*turn.said, answer], turn.chars + num_chars(answer)
            session.known = {**turn.known, len(turn.said): exact}
            session.turns.append(session.settled)
            session.settled, session.turn = len(session.messages), None

    def _undo(self, turn: Turn) -> None:
        with self._lock:
            session = self._sessions.get(turn.session_id)
            if session is not None and session.turn is turn:
                session.turn = None
                session.expires_s = self._clock() + session.ttl_s


def _key(namespace: str | Namespace) -> bytes:
    return (namespace if isinstance(namespace, Namespace) else Namespace(namespace)).key
