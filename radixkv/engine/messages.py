"""Chat messages as clients send them: one form to render, and one to compare.

A client that resends a conversation may write the same message otherwise: a list of parts for a text, null for an empty
content, spaces in the arguments of a tool call, keys more or fewer. None of that makes another message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from radixkv.engine.thinking import THINK, ThinkingTags, spoken_text
from radixkv.errors import ConfigError

__all__ = ["canonical_message", "canonical_tools", "part_end", "rendered_message", "text_of"]


def text_of(content: object) -> str:
    """The text of a message's content: a text, None, or a list of parts that have a text each.

    Raises:
        ConfigError: anything else, such as an image.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(map(_part_text, content))
    raise ConfigError("content", type(content).__name__, "a text, null, or a list of text parts")


def part_end(content: object, part: int) -> int:
    """How many characters of `text_of(content)` lie before the end of its part `part`; a plain text is one part.

    Raises:
        ConfigError: there is no such part.
    """
    parts: Sequence[object] = [text_of(content)] if content is None or isinstance(content, str) else list(_parts(content))
    if not 0 <= part < len(parts):
        raise ConfigError("part", part, f"0 to {len(parts) - 1}, a part of this message's content")
    return sum(len(_part_text(one)) for one in parts[: part + 1])


def rendered_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates read it: its content one text, the arguments of its tool calls parsed.

    Raises:
        ConfigError: a content without text.
    """
    rendered = {**message, "content": text_of(message.get("content"))}
    if message.get("tool_calls"):
        rendered["tool_calls"] = [_rendered_call(call) for call in message["tool_calls"]]
    return rendered


def canonical_message(message: Mapping[str, Any], tags: ThinkingTags = THINK, *, opened: bool = False) -> bytes:
    """The same bytes for every way to write the same message.

    Role, name, text, and tool calls by name and arguments count; ids and other keys do not. Of an assistant's message,
    thinking and white space around the text do not count either.

    Args:
        message: as in a chat request.
        tags: the texts around the thinking.
        opened: as for `spoken_text`.

    Raises:
        ConfigError: a content without text.
    """
    text = text_of(message.get("content"))
    if message.get("role") == "assistant":
        text = spoken_text(text, tags, opened=opened).strip()
    calls = [_canonical_call(call) for call in message.get("tool_calls") or ()]
    return _dump([message.get("role"), message.get("name"), text, calls])


def canonical_tools(tools: Sequence[Any] | None) -> bytes:
    """The same bytes for the same tools in the same order, however their JSON is written; b"" for none.

    Raises:
        ConfigError: nested too deeply to be compared.
    """
    try:
        return _dump([_plain(tool) for tool in tools]) if tools else b""
    except RecursionError:
        raise ConfigError("tools", type(tools).__name__, "JSON that is not nested so deeply") from None


def _parts(content: object) -> Sequence[object]:
    if not isinstance(content, Sequence):
        raise ConfigError("content", type(content).__name__, "a text, null, or a list of text parts")
    return content


def _part_text(part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise ConfigError("content", kind, "parts that have a text")
    return text


def _rendered_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping):
        return dict(call)
    arguments = _parsed(function.get("arguments"))
    readable = arguments if isinstance(arguments, Mapping) else function.get("arguments")
    return {**call, "function": {**function, "arguments": readable}}


def _canonical_call(call: Mapping[str, Any]) -> list[Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    try:
        return [function.get("name"), _dump(_plain(_parsed(arguments))).decode("ascii")]
    except RecursionError:
        if isinstance(arguments, str):  # compared as the text it is
            return [function.get("name"), arguments]
        raise ConfigError("arguments", type(arguments).__name__, "JSON that is not nested so deeply") from None


def _parsed(arguments: object) -> object:
    """Arguments as JSON values; a model may have written what is none, and that stays text. None are an empty object."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments


def _plain(value: object) -> object:
    """JSON values, with 1.0 as 1: other languages know one kind of number only."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _dump(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode("ascii")
