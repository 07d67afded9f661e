"""Calls of tools, read from an answer while it arrives.

They are read in the forms models were trained to write: Hermes and Qwen `<tool_call>{...}</tool_call>`, Mistral
`[TOOL_CALLS] [...]`, and Llama's bare `{"name": ..., "parameters": ...}` as the whole answer. A marker is decided on by
the shortest text behind it that leaves no doubt, so how the text was cut into pieces changes nothing.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ParsedText", "ToolCall", "ToolCallParser", "as_object", "json_text"]

_OPEN, _CLOSE, _MISTRAL = "<tool_call>", "</tool_call>", "[TOOL_CALLS]"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model made: an id of its own, the function's name, and its arguments as the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ParsedText:
    """What became certain: text to show, and the calls that were completed."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()


def _new_id() -> str:
    """Nine letters and digits: templates of Mistral models refuse ids of any other form."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class ToolCallParser:
    """Tells text from calls while an answer arrives. However it is cut into pieces, the same comes out.

    Held back: what may become a call, and white space that goes where a call follows. A call that is malformed is text,
    and an answer without a call comes out unchanged.

    Args:
        names: the functions there are. An answer that is bare JSON is a call only of one of these; None allows any.
        new_id: makes the id of a call.
    """

    def __init__(self, names: Collection[str] | None = None, new_id: Callable[[], str] = _new_id) -> None:
        self._names = None if names is None else frozenset(names)
        self._new_id = new_id
        self._held = ""
        self._skip = 0  # characters at the start of `_held` that are known to be text, whatever they look like
        self._tried = 0  # characters behind the marker whose closing tags are known to be inside a string
        self._at_start = True  # no text was certain yet: the whole answer may be a call
        self._after_call = False

    def push(self, text: str) -> ParsedText:
        """Take the next piece; returns what became certain."""
        self._held += text
        return self._take(final=False)

    def flush(self) -> ParsedText:
        """Return what is still held back: the answer has ended."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> ParsedText:
        shown: list[str] = []
        calls: list[ToolCall] = []
        while self._step(shown, calls, final=final):
            pass
        return ParsedText("".join(shown), tuple(calls))

    def _step(self, shown: list[str], calls: list[ToolCall], *, final: bool) -> bool:
        """Decide on the next piece of what is held; False when nothing more can be decided."""
        if self._at_start:
            verdict = _bare_calls(self._held, self._names, final=final)
            if verdict is None:
                return False
            self._at_start = False
            if verdict:
                self._accept(verdict, len(self._held), "", shown, calls)
                return True
        found = _marker(self._held, self._skip)
        if found is None:
            self._release(shown, final=final)
            return False
        start, marker = found
        body = self._held[start + len(marker) :]
        decided = _tagged(body, self._tried, final=final) if marker == _OPEN else _listed(body, final=final)
        if decided is None:
            self._tried = max(len(body) - len(_CLOSE) + 1, 0)
            self._show(start, shown, final=False)
            return False
        self._tried = 0
        if decided.found is None:
            self._skip = start + len(marker)  # what opens no call is text; look on behind it
        else:
            self._accept(decided.found, start + len(marker) + decided.end, self._held[:start], shown, calls)
        return True

    def _accept(self, found: list[_Found], end: int, before: str, shown: list[str], calls: list[ToolCall]) -> None:
        text = before.rstrip()
        if text:
            shown.append(text)
        calls += [ToolCall(self._new_id(), one.name, one.arguments) for one in found]
        self._held, self._skip, self._after_call = self._held[end:], 0, True

    def _release(self, shown: list[str], *, final: bool) -> None:
        """Show what can be no part of a call: all but the head of a marker at the end."""
        heads = () if final else (_head_at_end(self._held[self._skip :], marker) for marker in (_OPEN, _MISTRAL))
        self._show(len(self._held) - max(heads, default=0), shown, final=final)

    def _show(self, end: int, shown: list[str], *, final: bool) -> None:
        """Show the held text before `end`, without white space that a call may still swallow."""
        text = self._held[:end]
        kept = text if final and not (self._after_call and not text.strip()) else text.rstrip()
        if kept:
            shown.append(kept)
            self._after_call = False
        drop = len(text) if final else len(kept)
        self._held, self._skip = self._held[drop:], max(self._skip - drop, 0)


@dataclass(frozen=True, slots=True)
class _Found:
    """A call without its id."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class _Decided:
    """Whether a marker opened calls (else `found` is None), and where they end."""

    found: list[_Found] | None
    end: int = 0


_NO_CALL = _Decided(None)
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_FIRST_KEY = re.compile(r'\s*(?:\[\s*)?\{\s*"([^"\\]*)"')
_FIRST_NAME = re.compile(r'\s*(?:\[\s*)?\{\s*"name"\s*:\s*"([^"\\]*)"')
_BARE = re.compile(r'(?:\[\s*)?(?:\{\s*(?:".*)?)?', re.DOTALL)
_KEYS = frozenset({"name", "arguments", "parameters", "type", "function", "id"})


def _marker(text: str, start: int) -> tuple[int, str] | None:
    """Where the first marker is, and which one."""
    places = [(text.find(marker, start), marker) for marker in (_OPEN, _MISTRAL)]
    return min((place for place in places if place[0] >= 0), default=None)


def _tagged(body: str, tried: int, *, final: bool) -> _Decided | None:
    """Decide on what follows `<tool_call>`; None while more of it is needed. Tags before `tried` were tried in vain."""
    inner = body.lstrip()
    if inner and inner[0] not in "{[":
        return _NO_CALL
    at = body.find(_CLOSE, tried)
    while at >= 0:
        found = _calls_in(body[:at])
        if found is not None:
            return _Decided(found, at + len(_CLOSE))
        if '"' not in _STRINGS.sub("", body[:at]):
            return _NO_CALL
        at = body.find(_CLOSE, at + 1)  # this one is inside a string
    if not final:
        return None
    found = _calls_in(body)  # models leave out the last closing tag
    return _NO_CALL if found is None else _Decided(found, len(body))


def _listed(body: str, *, final: bool) -> _Decided | None:
    """Decide on what follows `[TOOL_CALLS]`: a JSON list; None while more of it is needed."""
    inner = body.lstrip()
    if inner and inner[0] != "[":
        return _NO_CALL
    if "]" in inner:
        try:
            end = json.JSONDecoder().raw_decode(inner)[1]
        except (ValueError, RecursionError):
            return _NO_CALL if final else None
        found = _calls_in(inner[:end])
        return _NO_CALL if found is None else _Decided(found, len(body) - len(inner) + end)
    return _NO_CALL if final else None


def _bare_calls(text: str, names: frozenset[str] | None, *, final: bool) -> list[_Found] | None:
    """The calls that a whole answer is; [] if it is none, None while that is open."""
    inner = text.lstrip()
    if not inner:
        return [] if final else None
    if _MISTRAL.startswith(inner):
        return [] if final else None
    if not _BARE.fullmatch(inner):
        return []
    key, name = _FIRST_KEY.match(text), _FIRST_NAME.match(text)
    if (key and key[1] not in _KEYS) or (name and names is not None and name[1] not in names):
        return []
    if not final:
        return None
    found = _calls_in(inner, strict=True) or []
    return found if all(names is None or one.name in names for one in found) else []


def _calls_in(text: str, *, strict: bool = False) -> list[_Found] | None:
    """The calls of a JSON text: one, or a list of them; None if it is anything else.

    Args:
        text: JSON.
        strict: a call must say its arguments, even where it has none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = [_call(one, strict) for one in (value if isinstance(value, list) else [value])]
    return None if None in found else [one for one in found if one is not None]


def _call(value: Any, strict: bool) -> _Found | None:
    value = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    given = value.get("arguments", value.get("parameters", None if strict else {}))
    arguments = as_object(given)
    try:
        return None if arguments is None else _Found(value["name"], json_text(arguments))
    except ValueError:  # a number that JSON cannot write
        return None


def as_object(value: Any) -> dict[str, Any] | None:
    """Return a JSON object, or one written as text inside a text; None for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return dict(value) if isinstance(value, Mapping) else None


def json_text(value: Any) -> str:
    """Write JSON, the same bytes for the same value; text stays as it is, unless half a character is in it.

    Raises:
        ValueError: a number that JSON cannot write, or what is no JSON value.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, allow_nan=False)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return text


def _head_at_end(text: str, marker: str) -> int:
    """How many last characters of `text` are the first ones of `marker`."""
    longest = min(len(marker) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
