"""The conversation of a chat request: its messages as templates read them, its prompt, and its answers for the next turn.

Answers that were generated here stand in later prompts as the very ids they were generated as, so that a client that resends
its whole history finds all of it in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import Request

from radixkv.engine.answers import exact_answer
from radixkv.engine.layout import ChatPrompt
from radixkv.engine.thinking import THINK
from radixkv.engine.tools import ToolPrompt, forced_structure, tool_prompt
from radixkv.retention import Retain
from radixkv_service.errors import bad_request, unsupported
from radixkv_service.openai_models import ChatMessage, ChatRequest, FunctionChoice, Tool
from radixkv_service.prompt_limits import refuse_long_messages
from radixkv_service.service import Service
from radixkv_service.session_turns import SessionTurn, open_turn, session_id_of

if TYPE_CHECKING:
    from radixkv.engine.answers import ExactAnswer
    from radixkv.engine.output import Completion
    from radixkv.engine.structure import Structure
    from radixkv.engine.transcripts import Transcripts
    from radixkv.tokens import Tokens

__all__ = ["Dialog", "messages_of", "open_dialog", "tools_of"]

_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True, slots=True)
class Dialog:
    """A chat request's conversation.

    Attributes:
        transcripts: the answers given lately.
        shown: messages and tools, as the model's template reads them.
        namespace: whose conversation it is.
        prompt: the ids up to where the next answer begins.
        functions: names that the answer may call; none: its text is no call, whatever it looks like.
        forced: the form of an answer that must be a call.
        parallel: whether it may call several times.
        turn: of a session, which then keeps the answer.
    """

    transcripts: Transcripts
    shown: ToolPrompt
    namespace: str
    prompt: Tokens
    functions: frozenset[str]
    forced: Structure | None
    parallel: bool
    turn: SessionTurn | None = None

    def undo(self) -> None:
        """There is no answer: a session stays as it was."""
        if self.turn is not None:
            self.turn.undo()

    def keep(self, wishes: tuple[Retain, ...]) -> Callable[[Completion], tuple[Retain, ...]]:
        """What to retain once the answer is there: as wished, but least of all what its thinking makes dead.

        A template that drops earlier thinking makes everything from its beginning on unreachable for later turns.
        """
        splicer = self.transcripts.splicer

        def ask(completion: Completion) -> tuple[Retain, ...]:
            if self.turn is not None or not (splicer.opened or THINK.opening in completion.text):
                return wishes
            exact = exact_answer(splicer.tokenizer, completion, opened=splicer.opened)
            shown, prompt = self.shown, ChatPrompt(self.prompt, (), ())
            answer = {"role": "assistant", "content": completion.text}
            dead = self.transcripts.dead_from(
                prompt, shown.messages, answer, exact, tools=shown.tools, namespace=self.namespace
            )
            if dead is None:
                return wishes
            alive = (replace(wish, stop=min(wish.stop or dead, dead)) for wish in wishes if wish.start < dead)
            return (*alive, Retain(dead, None, 0))

        return ask

    def remember(self, answer: Mapping[str, Any], completion: Completion) -> ExactAnswer:
        """Keep an answer's ids for the next turn. Cost: O(characters of the messages)."""
        (written,) = tool_prompt(self.transcripts.splicer.tokenizer, [answer]).messages
        if self.turn is not None:
            return self.turn.keep(written, completion)
        shown = self.shown
        return self.transcripts.remember(shown.messages, written, completion, tools=shown.tools, namespace=self.namespace)


def open_dialog(service: Service, request: Request, body: ChatRequest, namespace: str) -> Dialog:
    """Make a request's prompt. Takes time: not for the event loop.

    Raises:
        ProblemError: a part of a message that is not read, or more than any prompt holds.
        EngineError: the template refuses the messages.
        ConfigError: tools, or a choice among them, that cannot be.
    """
    messages, tools = messages_of(body.messages), tools_of(body.tools)
    refuse_long_messages(service, messages, tools)
    session_id = session_id_of(request, body.session_id)
    if session_id is not None:
        return _open_turn(service, request, session_id, body, messages, namespace)
    choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, FunctionChoice) else body.tool_choice
    shown = tool_prompt(service.engine.tokenizer, messages, tools)
    return Dialog(
        transcripts=service.transcripts,
        shown=shown,
        namespace=namespace,
        prompt=service.transcripts.prompt_ids(shown.messages, tools=shown.tools, namespace=namespace).ids,
        functions=frozenset(tool["function"]["name"] for tool in tools) if choice != "none" else frozenset(),
        forced=forced_structure(tools, choice),
        parallel=body.parallel_tool_calls is not False,
    )


def _open_turn(
    service: Service,
    request: Request,
    session_id: str,
    body: ChatRequest,
    messages: Sequence[Mapping[str, Any]],
    namespace: str,
) -> Dialog:
    """The conversation of a session, with the request's messages behind it."""
    if body.tools:
        raise bad_request("tools: a session has none; resend the messages instead", "tools")
    if (body.n or 1) > 1:
        raise bad_request(f"n={body.n}: a turn of a session has one answer; fork the session for others", "n")
    turn = open_turn(service, request, session_id, body.cache_salt, messages)
    return Dialog(service.transcripts, turn.shown, namespace, turn.ids, frozenset(), None, parallel=True, turn=turn)


def tools_of(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """Tools in OpenAI's form, with nothing that the client did not send."""
    return [tool.model_dump(exclude_unset=True) for tool in tools or ()]


def messages_of(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates read them: one text each.

    Raises:
        ProblemError: a part that is no text, or no content where one is needed.
    """
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: ChatMessage, place: str) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    plain["content"] = _content(message, f"{place}.content")
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_calls:
        plain["tool_calls"] = [call.model_dump(include={"id", "type", "function"}) for call in message.tool_calls]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        plain["reasoning_content"] = message.reasoning_content
    return plain


def _content(message: ChatMessage, place: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role != "assistant":
            raise bad_request(f"{place}: a {message.role} message needs a content", place)
        return ""
    texts = []
    for index, part in enumerate(message.content):
        if part.type not in _TEXT_PARTS or part.text is None:
            raise unsupported(f"{place}[{index}]", f"parts of type {part.type!r} are not read, text is")
        texts.append(part.text)
    return "".join(texts)
