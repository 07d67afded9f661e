"""The prompt of a Messages request: the dialog that it opens, and what to keep of its tokens for how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request

from radixkv.engine.tools import ToolPrompt, forced_structure
from radixkv.retention import DEFAULT_PRIORITY, Retain
from radixkv.tokens import Tokens
from radixkv_service.anthropic_dialog import Shown, Told, shown, told
from radixkv_service.anthropic_models import MessagesInput
from radixkv_service.dialog import Dialog
from radixkv_service.errors import bad_request
from radixkv_service.generation import namespace_of
from radixkv_service.openai_models import Request as PlainRequest
from radixkv_service.prompt_limits import refuse_long_messages
from radixkv_service.service import Service
from radixkv_service.session_turns import SessionTurn, open_turn, session_id_of

if TYPE_CHECKING:
    from radixkv.engine.layout import ChatPrompt

__all__ = ["MessagesPrompt", "open_prompt", "ranges_of"]

_HOUR_S = 3600.0
_PRIORITY = DEFAULT_PRIORITY + 15
_PRIORITY_OF_AN_HOUR = DEFAULT_PRIORITY + 30


@dataclass(frozen=True, slots=True)
class MessagesPrompt:
    """What a Messages request asks.

    Attributes:
        dialog: its conversation.
        retention: of its tokens.
        begun: whether the client gave the beginning of the answer. Only the rest is generated then, so its ids are not those
            of the message that the client sends next time.
    """

    dialog: Dialog
    retention: tuple[Retain, ...]
    begun: bool


def open_prompt(service: Service, request: Request, body: MessagesInput) -> MessagesPrompt:
    """Make a request's prompt. Takes time: not for the event loop.

    Args:
        service: with tokenizer, transcripts and sessions.
        request: whose tenant it is.
        body: what is asked.

    Raises:
        ProblemError: a block, a tool or a breakpoint that cannot be, or too much text.
        EngineError: the template refuses the messages.
        SessionNotFound, SessionBusy: of a session. ConfigError, StructureError: a tool that cannot be called.
    """
    asked = told(body)
    refuse_long_messages(service, [*asked.messages, {"content": asked.prefill}], asked.tools)
    given = shown(service.engine.tokenizer, asked)
    namespace = namespace_of(service, request, PlainRequest.model_validate({"cache_salt": body.cache_salt}))
    session_id = session_id_of(request, body.session_id)
    turn = _turn(service, request, session_id, body, asked, given) if session_id is not None else None
    if turn is None:
        transcripts = service.transcripts
        prompt = transcripts.prompt_ids(given.messages, tools=given.tools, namespace=namespace, marks=given.marks)
    else:
        prompt = turn.turn.prompt
    ids = prompt.ids
    if asked.prefill:
        ids = ids + Tokens(service.engine.tokenizer.encode(asked.prefill, special=False, bos=False))
    choice = body.tool_choice
    dialog = Dialog(
        transcripts=service.transcripts,
        shown=ToolPrompt(given.messages, given.tools) if turn is None else turn.shown,
        namespace=namespace,
        prompt=ids,
        functions=_functions(asked.tools, body),
        forced=forced_structure(asked.tools, _choice(body)),
        parallel=choice is None or not choice.disable_parallel_tool_use,
        turn=turn,
    )
    return MessagesPrompt(dialog, _retention(given, prompt, len(ids)), bool(asked.prefill))


def _turn(
    service: Service, request: Request, session_id: str, body: MessagesInput, asked: Told, given: Shown
) -> SessionTurn:
    if asked.tools or body.system or asked.prefill:
        message = "a session is sent new messages only; its system prompt is given when it is opened, and it has no tools"
        raise bad_request(f"session_id: {message}", "session_id")
    return open_turn(service, request, session_id, body.cache_salt, asked.messages, given.marks)


def _functions(tools: Sequence[Mapping[str, Any]], body: MessagesInput) -> frozenset[str]:
    """The tools that the answer may call."""
    none = body.tool_choice is not None and body.tool_choice.type == "none"
    return frozenset() if none else frozenset(tool["function"]["name"] for tool in tools)


def _choice(body: MessagesInput) -> Any:
    """The tool choice, in OpenAI's form."""
    choice = body.tool_choice
    if choice is None or choice.type in ("auto", "none"):
        return None
    return "required" if choice.type == "any" else {"type": "function", "function": {"name": choice.name}}


def _retention(given: Shown, prompt: ChatPrompt, num_tokens: int) -> tuple[Retain, ...]:
    ends = [(stop, one.ttl_s) for stop, one in zip(prompt.marks, given.breakpoints, strict=True)]
    return ranges_of(ends + [(num_tokens, one.ttl_s) for one in given.behind])


def ranges_of(ends: Sequence[tuple[int, float]]) -> tuple[Retain, ...]:
    """The wishes of breakpoints, as ranges that do not overlap.

    A breakpoint wishes for all that comes before it, so what lies before several is wanted for the longest of their times,
    and one level higher for each of them: the system prompt in front of many conversations outlives the end of one.

    Args:
        ends: (tokens before the breakpoint, seconds after the last use); 0 tokens: its place is not known.

    >>> [(one.start, one.stop, one.priority, one.ttl_s) for one in ranges_of([(100, 3600.0), (900, 300.0)])]
    [(0, 100, 66, 3600.0), (100, 900, 50, 300.0)]
    """
    ranges: list[Retain] = []
    start = 0
    for stop in sorted({stop for stop, _ in ends}):
        times = [ttl_s for other, ttl_s in ends if other >= stop]
        if stop > start:
            level = _PRIORITY_OF_AN_HOUR if max(times) >= _HOUR_S else _PRIORITY
            ranges.append(Retain(start, stop, level + len(times) - 1, max(times)))
            start = stop
    return tuple(ranges)
