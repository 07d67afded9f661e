"""A Messages request as chat templates read it: blocks become messages, tools functions, breakpoints places in the prompt.

system, messages, tools ── told ──▶ OpenAI's form ── shown ──▶ what the template is given, and its marks
│
session? its turn │ else transcripts ──▶ prompt, with known answers as they were generated
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from radixkv.engine.messages import text_of
from radixkv.engine.toolcalls import json_text
from radixkv.engine.tools import tool_prompt
from radixkv_service.anthropic_models import Block, CacheControl, InputMessage, InputTool, MessagesInput
from radixkv_service.errors import bad_request, unsupported

if TYPE_CHECKING:
    from radixkv.engine.tokenizer import Tokenizer

__all__ = ["Breakpoint", "Shown", "Told", "shown", "told"]

_MAX_BREAKPOINTS = 4
_TTL_S = {"5m": 300.0, "1h": 3600.0}


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """A wish to keep what comes before a place.

    Attributes:
        message: index of the place's message; -1 is the tools, and the number of messages the end of the prompt.
        part: index of the part of its content behind which the place is.
        ttl_s: seconds after the last use until the wish is over.
    """

    message: int
    part: int
    ttl_s: float


@dataclass(slots=True)
class Told:
    """A request in OpenAI's form.

    Attributes:
        messages: the conversation; the content of those with parts is a list of texts.
        tools: functions.
        breakpoints: in the order of the prompt.
        prefill: text that the answer begins with, given by the client.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    breakpoints: list[Breakpoint] = field(default_factory=list)
    prefill: str = ""

    def mark(self, control: CacheControl | None, part: int) -> None:
        """Note a breakpoint in the last message."""
        if control is not None:
            self.breakpoints.append(Breakpoint(len(self.messages) - 1, part, _TTL_S[control.ttl or "5m"]))


@dataclass(frozen=True, slots=True)
class Shown:
    """What the chat template is given.

    Attributes:
        messages: for `Transcripts.prompt_ids`.
        tools: as well; None where the messages say them.
        marks: (index of a message, index of a part) for each breakpoint that lies inside the messages.
        breakpoints: those, in the same order.
        behind: breakpoints at the prompt's end.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    marks: tuple[tuple[int, int], ...]
    breakpoints: tuple[Breakpoint, ...]
    behind: tuple[Breakpoint, ...]


# -- to OpenAI's form --------------------------------------------------------------------------------------------------


def told(body: MessagesInput) -> Told:
    """Read a request's blocks.

    Raises:
        ProblemError: a block, tool or breakpoint that cannot be; it is named.
    """
    result = Told()
    for index, tool in enumerate(body.tools or ()):
        result.tools.append(_function(tool, f"tools[{index}]"))
        result.mark(tool.cache_control, 0)  # no message is there yet, so its place is -1
    if body.system:
        _plain(result, "system", body.system, "system")
    messages = body.messages
    last = messages[-1]
    if last.role == "assistant":
        if len(messages) == 1:
            raise bad_request("messages: one of the user is needed before the assistant's", "messages")
        result.prefill = _prefill(last, f"messages[{len(messages) - 1}]")
        messages = messages[:-1]
    names: dict[str, str] = {}
    for index, message in enumerate(messages):
        place = f"messages[{index}].content"
        if message.role == "assistant":
            _assistant(result, message, place, names)
        elif message.role == "user":
            _user(result, message, place, names)
        else:
            _plain(result, "system", message.content, place)
    if body.cache_control is not None:
        ttl_s = _TTL_S[body.cache_control.ttl or "5m"]
        result.breakpoints.append(Breakpoint(len(result.messages), 0, ttl_s))
    if len(result.breakpoints) > _MAX_BREAKPOINTS:
        message_text = f"cache_control: {len(result.breakpoints)} breakpoints, and at most {_MAX_BREAKPOINTS} may be set"
        raise bad_request(message_text, "cache_control")
    return result


def _function(tool: InputTool, place: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise unsupported(
            f"{place}.type", f"{tool.type!r} is a tool that Anthropic defines; give yours with an input_schema"
        )
    if tool.input_schema is None:
        raise bad_request(f"{place}.input_schema: a tool needs one", f"{place}.input_schema", "missing_required_parameter")
    about = {"description": tool.description} if tool.description is not None else {}
    return {"type": "function", "function": {"name": tool.name, **about, "parameters": tool.input_schema}}


def _plain(result: Told, role: str, content: str | list[Block], place: str) -> None:
    """A message of text alone."""
    if isinstance(content, str):
        result.messages.append({"role": role, "content": content})
        return
    parts = [_text(block, f"{place}[{index}]") for index, block in enumerate(content)]
    result.messages.append({"role": role, "content": parts or ""})
    for index, block in enumerate(content):
        result.mark(block.cache_control, index)


def _user(result: Told, message: InputMessage, place: str, names: Mapping[str, str]) -> None:
    """Results of tools are messages of their own; what is said between them too."""
    if isinstance(message.content, str):
        result.messages.append({"role": "user", "content": message.content})
        return
    if not message.content:
        raise bad_request(f"{place}: a message needs at least one block", place)
    parts: list[dict[str, str]] = []
    for index, block in enumerate(message.content):
        here = f"{place}[{index}]"
        if block.type == "tool_result":
            parts = []
            result.messages.append(_tool_result(block, here, names))
            result.mark(block.cache_control, 0)
            continue
        if not parts:
            result.messages.append({"role": "user", "content": parts})
        parts.append(_text(block, here))
        result.mark(block.cache_control, len(parts) - 1)


def _tool_result(block: Block, place: str, names: Mapping[str, str]) -> dict[str, Any]:
    if block.tool_use_id is None:
        raise bad_request(f"{place}.tool_use_id: needed", f"{place}.tool_use_id", "missing_required_parameter")
    content = block.content or ""
    if not isinstance(content, str):
        content = "".join(_text(one, f"{place}.content[{index}]")["text"] for index, one in enumerate(content))
    shown_text = f"Error: {content}" if block.is_error else content  # templates have no other place for it
    name = {"name": names[block.tool_use_id]} if block.tool_use_id in names else {}
    return {"role": "tool", "content": shown_text, "tool_call_id": block.tool_use_id, **name}


def _assistant(result: Told, message: InputMessage, place: str, names: dict[str, str]) -> None:
    if isinstance(message.content, str):
        result.messages.append({"role": "assistant", "content": message.content})
        return
    parts: list[dict[str, str]] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    plain: dict[str, Any] = {"role": "assistant", "content": parts}
    result.messages.append(plain)
    for index, block in enumerate(message.content):
        here = f"{place}[{index}]"
        if block.type == "tool_use":
            calls.append(_call(block, here))
            names[block.id or ""] = block.name or ""
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        else:
            parts.append(_text(block, here))
        result.mark(block.cache_control, max(len(parts) - 1, 0))
    plain["content"] = parts or ""
    if calls:
        plain["tool_calls"] = calls
    if thoughts:
        plain["reasoning_content"] = "\n".join(thoughts)


def _call(block: Block, place: str) -> dict[str, Any]:
    for name in ("id", "name"):
        if not getattr(block, name):
            raise bad_request(f"{place}.{name}: needed", f"{place}.{name}", "missing_required_parameter")
    function = {"name": block.name, "arguments": json_text(block.input or {})}
    return {"id": block.id, "type": "function", "function": function}


def _prefill(message: InputMessage, place: str) -> str:
    """The text of a last message of the assistant, which the answer goes on with."""
    content = message.content
    blocks = [] if isinstance(content, str) else content
    text = content if isinstance(content, str) else "".join(_text(b, f"{place}.content")["text"] for b in blocks)
    if text != text.rstrip():
        raise bad_request(f"{place}: text that the answer begins with may not end with white space", place)
    return text


def _text(block: Block, place: str) -> dict[str, str]:
    if block.type != "text":
        raise unsupported(place, f"blocks of type {block.type!r} are not read here, text is")
    if block.text is None:
        raise bad_request(f"{place}.text: needed", f"{place}.text", "missing_required_parameter")
    return {"type": "text", "text": block.text}


# -- to the template's form --------------------------------------------------------------------------------------------


def shown(tokenizer: Tokenizer, request: Told) -> Shown:
    """Prepare a request for the model's chat template, and find its breakpoints again there.

    Raises:
        ConfigError: tools or earlier calls that cannot be shown.
    """
    prepared = tool_prompt(tokenizer, request.messages, request.tools)
    inside = [one for one in request.breakpoints if one.message < len(request.messages)]
    behind = tuple(one for one in request.breakpoints if one.message >= len(request.messages))
    if any(one.message < 0 for one in inside) and prepared.messages and prepared.messages[0]["role"] != "system":
        first = prepared.messages[0]  # an empty part in front of all: its end is the end of the tools
        prepared.messages[0] = {**first, "content": [{"type": "text", "text": ""}, *_parts(first.get("content"))]}
        shift = 1
    else:
        shift = 0
    counts = _counts(tokenizer, request, inside)
    marks = tuple(_mark(one, prepared.messages, counts.get(one.message, 0), shift) for one in inside)
    return Shown(prepared.messages, prepared.tools, marks, tuple(inside), behind)


def _counts(tokenizer: Tokenizer, request: Told, inside: Sequence[Breakpoint]) -> dict[int, int]:
    """For each message with a breakpoint, the index of the message that shows it: results in a row may be one."""
    places = {one.message for one in inside if one.message >= 0}
    if not request.tools and all(message["role"] in ("system", "user") for message in request.messages):
        return {place: place for place in places}
    return {
        place: len(tool_prompt(tokenizer, request.messages[: place + 1], request.tools).messages) - 1 for place in places
    }


def _mark(one: Breakpoint, messages: Sequence[Mapping[str, Any]], index: int, shift: int) -> tuple[int, int]:
    """Where a breakpoint is. Where a content has lost its parts, it is behind the whole; so is that of the tools."""
    num_parts = len(_parts(messages[index].get("content")))
    if one.message < 0:
        return (0, 0 if shift else num_parts - 1)
    part = one.part + (shift if index == 0 else 0)
    return (index, min(part, num_parts - 1))


def _parts(content: object) -> list[Any]:
    """The parts of a content; of plain text, one."""
    return list(content) if isinstance(content, list) else [{"type": "text", "text": text_of(content)}]
