"""Tools, as text: shown to the model, and if need be forced upon it. Its calls are read elsewhere, and named here too.

client's tools, messages ── tool_prompt ──▶ what the chat template is given
tool_choice "required" or a name ── forced_structure ──▶ a Structure: exactly one call
pieces of an answer ── ReasoningParser (reasoning.py) ── ToolCallParser (toolcalls.py) ──▶ reasoning, text, calls
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from radixkv.engine.reasoning import ParsedReasoning, ReasoningParser, opens_reasoning
from radixkv.engine.structure import Structure
from radixkv.engine.toolcalls import ParsedText, ToolCall, ToolCallParser, as_object, json_text
from radixkv.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from radixkv.engine.tokenizer import Tokenizer

__all__ = [
    "ParsedReasoning",
    "ParsedText",
    "ReasoningParser",
    "ToolCall",
    "ToolCallParser",
    "ToolPrompt",
    "forced_structure",
    "opens_reasoning",
    "reads_tools",
    "tool_prompt",
]

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_ABOUT = """You can call functions. Here they are, each as a JSON schema:
<tools>
{tools}
</tools>

To call one, answer with its name and its arguments as a JSON object between tags, and one such pair of tags a call:
<tool_call>
{{"name": <function name>, "arguments": <object of arguments>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class ToolPrompt:
    """What to give to the chat template: messages, and tools if it reads them (else they are in the messages)."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


def reads_tools(tokenizer: Tokenizer) -> bool:
    """Whether the model's chat template shows tools. Cost: two renderings of one short message.

    Raises:
        ChatTemplateMissing: the model has none.
    """
    asked = [{"role": "user", "content": "x"}]
    probe = {"type": "function", "function": {"name": "probe", "description": "probe", "parameters": _NO_PARAMETERS}}
    plain = tokenizer.chat_text(asked)
    try:
        return "probe" in tokenizer.chat_text(asked, tools=[probe]) and "probe" not in plain
    except EngineError:  # a template that fails over tools does not show them
        return False


def tool_prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> ToolPrompt:
    """Prepare a conversation with tools for the model's chat template.

    A template that reads tools gets them, and the arguments of earlier calls as objects, which such templates expect.
    For any other, tools go to the end of the system message and calls and results become text. The tools' bytes depend
    on nothing but the tools, in the client's order: requests with the same system text and tools share that prefix.

    Args:
        tokenizer: of the model.
        messages: in OpenAI's form: assistant messages may have `tool_calls`, results have the role `tool`.
        tools: in OpenAI's form: {"type": "function", "function": {"name", "description", "parameters"}}.

    Raises:
        ConfigError: a tool without a name, or arguments of an earlier call that are no JSON object.
        ChatTemplateMissing: the model cannot chat.
    """
    functions = [_function(tool) for tool in tools]
    told = any("tool_calls" in message or message.get("role") == "tool" for message in messages)
    if not functions and not told:
        return ToolPrompt([dict(message) for message in messages], None)
    if reads_tools(tokenizer):
        return ToolPrompt([_with_objects(message) for message in messages], [dict(tool) for tool in tools] or None)
    shown = _as_text(messages)
    if functions:
        about = _ABOUT.format(tools="\n".join(json_text({"type": "function", "function": one}) for one in functions))
        if shown and shown[0]["role"] == "system":
            before = _text_of(shown[0].get("content"))
            shown[0] = {**shown[0], "content": f"{before}\n\n{about}" if before else about}
        else:
            shown.insert(0, {"role": "system", "content": about})
    return ToolPrompt(shown, None)


def _with_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose calls have arguments as objects, and whose content is text."""
    changed = {**message, "content": _text_of(message.get("content"))}
    if message.get("tool_calls"):
        changed["tool_calls"] = [{**call, "function": _past_call(call)} for call in message["tool_calls"]]
    return changed


def _as_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with calls and results written out; results in a row are one message, so that roles alternate."""
    shown: list[dict[str, Any]] = []
    results: list[str] | None = None
    for message in messages:
        if message.get("role") == "tool":
            response = f"<tool_response>\n{_text_of(message.get('content'))}\n</tool_response>"
            if results is None:
                results = []
                shown.append({"role": "user"})
            results.append(response)
            shown[-1]["content"] = "\n".join(results)
            continue
        results = None
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        if message.get("tool_calls"):
            calls = [f"<tool_call>\n{json_text(_past_call(call))}\n</tool_call>" for call in message["tool_calls"]]
            kept["content"] = "\n".join([text for text in (_text_of(message.get("content")),) if text] + calls)
        shown.append(kept)
    return shown


def _past_call(call: Any) -> dict[str, Any]:
    """{"name", "arguments"} of a call in the history, the arguments as an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigError("tool_calls", call, 'a call: {"function": {"name": ..., "arguments": ...}}')
    arguments = as_object(function.get("arguments") or {})
    if arguments is None:
        raise ConfigError("tool_calls", function["arguments"], "arguments that are a JSON object")
    return {"name": function["name"], "arguments": arguments}


def _text_of(content: Any) -> str:
    """The text of a message's content: text, nothing, or a list of parts."""
    if isinstance(content, (list, tuple)):
        return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)
    return "" if content is None else str(content)


# -- forced ------------------------------------------------------------------------------------------------------------


def forced_structure(tools: Sequence[Mapping[str, Any]], tool_choice: Any) -> Structure | None:
    """The form of an answer that must be exactly one call, in Hermes' form, with arguments of the function's schema.

    Args:
        tools: in OpenAI's form.
        tool_choice: "required", {"type": "function", "function": {"name": ...}}, "auto", "none" or None.

    Returns:
        The structure; None where no call is forced.

    Raises:
        ConfigError: no such choice, or a function that is not among the tools.
        StructureError: the schemas are longer than a structure may be. What they say is checked when it is compiled.
    """
    if tool_choice in (None, "auto", "none"):
        return None
    functions = [_function(tool) for tool in tools]
    if tool_choice != "required":
        function = tool_choice.get("function", tool_choice) if isinstance(tool_choice, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        if name is None:
            raise ConfigError("tool_choice", tool_choice, "auto, none, required, or a function's name in OpenAI's form")
        functions = [one for one in functions if one["name"] == name]
    if not functions:
        raise ConfigError("tool_choice", tool_choice, "a function that is among the tools")
    # Each schema stays a document of its own, so that its references keep their meaning.
    rules = [
        f"call_{number}: {json_text(_head(one['name']))} %json {json_text(one.get('parameters') or _NO_PARAMETERS)}"
        for number, one in enumerate(functions)
    ]
    either = " | ".join(f"call_{number}" for number in range(len(rules)))
    lines = [r'start: "<tool_call>\n" call "}\n</tool_call>"', f"call: {either}", *rules]
    return Structure.lark("\n".join(lines) + "\n")


def _head(name: str) -> str:
    return f'{{"name": {json_text(name)}, "arguments": '


def _function(tool: Any) -> dict[str, Any]:
    """The function of a tool in OpenAI's form."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ConfigError("tools", tool, 'a tool: {"type": "function", "function": {"name": ..., "parameters": ...}}')
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise ConfigError("tools", function["parameters"], "parameters that are a JSON schema")
    return dict(function)
