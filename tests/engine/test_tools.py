"""Tools as text: what the model is shown, what is read from its answer, and what is forced upon it."""

from __future__ import annotations

import json
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv.engine.tools import (
    ReasoningParser,
    ToolCallParser,
    forced_structure,
    opens_reasoning,
    reads_tools,
    tool_prompt,
)
from radixkv.errors import ConfigError

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place — now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '{"name": "weather", "arguments": {"city": "Köln"}}'
LLAMA = '{"name": "weather", "parameters": {"city": "Köln"}}'
EXPECTED = ("weather", {"city": "Köln"})


def read(pieces, names=("weather",)):
    """All text, and all calls, of an answer given piece by piece."""
    numbers = count()
    parser = ToolCallParser(names, lambda: str(next(numbers)))
    out = [*(parser.push(piece) for piece in pieces), parser.flush()]
    calls = [call for one in out for call in one.calls]
    return "".join(one.text for one in out), [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", "", [EXPECTED]),
        (f"Let me look.\n<tool_call>{CALL}</tool_call>\n", "Let me look.", [EXPECTED]),
        (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", [EXPECTED, EXPECTED]),
        (f"<tool_call>[{CALL}, {CALL}]</tool_call>", "", [EXPECTED, EXPECTED]),
        (f"<tool_call>{CALL}</tool_call> Done. ", " Done. ", [EXPECTED]),
        (f"<tool_call>{CALL}", "", [EXPECTED]),
        ('<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
        ('<tool_call>{"name": "say", "arguments": {"x": "</tool_call>"}}</tool_call>', "", [("say", {"x": "</tool_call>"})]),
        (f"<tool_call> <tool_call>{CALL}</tool_call>", "<tool_call>", [EXPECTED]),
        (f"[TOOL_CALLS] [{CALL}]", "", [EXPECTED]),
        (f"[TOOL_CALLS][{CALL}, {CALL}]", "", [EXPECTED, EXPECTED]),
        (LLAMA, "", [EXPECTED]),
        (f"\n [{LLAMA}] \n", "", [EXPECTED]),
        (json.dumps({"type": "function", "function": json.loads(LLAMA)}), "", [EXPECTED]),
        ('{"name": "weather", "parameters": "{\\"city\\": \\"Köln\\"}"}', "", [EXPECTED]),
    ],
)
def test_every_form_of_a_call_is_read(answer, text, calls):
    assert read([answer]) == (text, calls)
    assert read(answer) == (text, calls), "one character at a time"


@pytest.mark.parametrize(
    "answer",
    [
        "Hello.",
        "",
        " \n",
        "a < b, <tool, <tool_call",
        "<tool_call>",
        "<tool_call>weather(city)</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"x": 1e999}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"city": ',
        "[TOOL_CALLS] weather",
        '[TOOL_CALLS] [{"name": ',
        "[TOOL_CALLS] [1]",
        "[1] is a reference, [TOOL",
        '{"name": "Alice", "parameters": {}}',
        '{"city": "Köln"}',
        '{"name": "weather"}',
        f"{LLAMA} and more",
        "[]",
        "{" * 5000,
        "[" * 5000,
    ],
)
def test_an_answer_without_a_whole_call_comes_out_unchanged(answer):
    assert read([answer]) == (answer, [])
    assert read([answer[i : i + 3] for i in range(0, len(answer), 3)]) == (answer, [])


PARTS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", CALL, LLAMA, f"[{CALL}]", f"<tool_call>{CALL}</tool_call>"]
PARTS += ["{", "}", "[", "]", '"', "\\", "\n", " ", "a", "<", "</tool", "[TOOL", '{"name": "', '{"x": 1}']
PARTS += ['{"name": "x</tool_call>"', "<think>", "</think>"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=8).map("".join), st.data())
def test_however_an_answer_is_cut_the_same_comes_out(answer, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    pieces = [answer[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    text, calls = read([answer])
    assert read(pieces) == (text, calls)
    assert read(answer) == (text, calls)
    if not calls and "[]" not in answer:
        assert text == answer
    for opened in (False, True):
        assert think(pieces, opened) == think([answer], opened) == think(answer, opened)


def test_the_head_of_a_call_is_never_shown():
    parser = ToolCallParser(["weather"])
    for char in f"Sure. <tool_call>{CALL}":
        assert not set(parser.push(char).text) & set("<{")
    (call,) = parser.push("</tool_call>").calls
    assert (len(call.id), call.id.isalnum(), call.name) == (9, True, "weather")


def test_many_closing_tags_inside_a_string_are_each_tried_once():
    """Tried anew with every piece, a thousand of them would take minutes."""
    inner = "</tool_call>" * 1000
    call = json.dumps({"name": "weather", "arguments": {"city": inner}})
    answer = f"<tool_call>{call}</tool_call>"
    pieces = [answer[i : i + 12] for i in range(0, len(answer), 12)]
    assert read(pieces) == ("", [("weather", {"city": inner})])


def test_text_that_can_be_no_call_is_shown_at_once():
    parser = ToolCallParser(["weather"])
    assert parser.push("Hello").text == "Hello"
    for opening, rest in ((' {"city', '": 1'), ("[1", "] is"), ('{"name": "Ali', 'ce"')):
        bare = ToolCallParser(["weather"])
        assert bare.push(opening).text + bare.push(rest).text == opening + rest


def think(pieces, opened=False):
    """(reasoning, content) of an answer given piece by piece."""
    parser = ReasoningParser(opened=opened)
    out = [*(parser.push(piece) for piece in pieces), parser.flush()]
    return "".join(one.reasoning for one in out), "".join(one.content for one in out)


@pytest.mark.parametrize(
    ("answer", "opened", "expected"),
    [
        ("<think>\nHm.\n</think>\n\nYes.\n", False, ("Hm.", "Yes.\n")),
        ("Hm, a </thin b.\n</think>\nYes.", True, ("Hm, a </thin b.", "Yes.")),
        ("<think>\nHm.</think>Yes", True, ("Hm.", "Yes")),
        ("<think>\n\n</think>\n\nYes", False, ("", "Yes")),
        (" <think> on and on ", False, ("on and on", "")),
        (" Yes <think>no</think>", False, ("", " Yes <think>no</think>")),
        ("<thi", False, ("", "<thi")),
        ("", True, ("", "")),
    ],
)
def test_reasoning_is_told_from_the_answer(answer, opened, expected):
    assert think([answer], opened) == expected
    assert think(answer, opened) == expected


def test_a_prompt_that_opens_reasoning_is_seen():
    assert opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not opens_reasoning("<|im_start|>assistant\n")


# -- prompts -----------------------------------------------------------------------------------------------------------

ASKED = {"role": "user", "content": "Weather in Köln?"}
HISTORY = [
    ASKED,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Köln"}'}}] * 2,
    },
    {"role": "tool", "tool_call_id": "1", "content": "12 °C"},
    {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "rain"}]},
    {"role": "user", "content": "And tomorrow?"},
]


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from radixkv.engine.tokenizer import Tokenizer

    return Tokenizer(smollm2.path)


@pytest.fixture(scope="module")
def reading(smollm2, tmp_path_factory):
    """The same tokenizer with a template that shows tools and calls."""
    from radixkv.engine.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("reading")
    (folder / "tokenizer.json").write_bytes((smollm2.path / "tokenizer.json").read_bytes())
    template = (
        "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content + '' }}"
        "{% for call in m.tool_calls or [] %}CALL {{ call.function.arguments.city }}{% endfor %}\n{% endfor %}"
    )
    settings = {"chat_template": template, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return Tokenizer(folder)


def test_a_template_that_reads_tools_gets_them(reading):
    assert reads_tools(reading)
    prompt = tool_prompt(reading, HISTORY, [WEATHER])
    text = reading.chat_text(prompt.messages, tools=prompt.tools)
    assert text.startswith("TOOLS [{")
    assert text.count("CALL Köln") == 2
    assert "<tools>" not in text


def test_for_any_other_template_tools_calls_and_results_become_text(tokenizer):
    assert not reads_tools(tokenizer)
    prompt = tool_prompt(tokenizer, HISTORY, [WEATHER])
    assert prompt.tools is None
    assert [message["role"] for message in prompt.messages] == ["system", "user", "assistant", "user", "user"]
    listed = prompt.messages[0]["content"].partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert json.loads(listed) == WEATHER
    assert read([prompt.messages[2]["content"]]) == ("", [EXPECTED, EXPECTED]), "what is shown is what is read"
    assert prompt.messages[3]["content"].count("<tool_response>") == 2
    assert "rain" in prompt.messages[3]["content"]
    assert tokenizer.chat_text(prompt.messages).count("<|im_start|>") == 6


def test_tools_are_a_prefix_that_requests_share(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    one = tool_prompt(tokenizer, [system, ASKED], [WEATHER])
    other = tool_prompt(tokenizer, [system, {"role": "user", "content": "Hi"}], [WEATHER])
    assert one.messages[0] == other.messages[0]
    assert one.messages[0]["content"].startswith("Be brief.\n\n")
    longer = tool_prompt(tokenizer, [system, *HISTORY], [WEATHER])
    assert tokenizer.chat_text(longer.messages).startswith(tokenizer.chat_text([one.messages[0], ASKED], False))


def test_without_tools_messages_are_left_alone(tokenizer):
    assert tool_prompt(tokenizer, [ASKED]).messages == [ASKED]


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([ASKED], [{"name": "weather"}]),
        ([ASKED], [{"type": "function", "function": {"name": "f", "parameters": "x"}}]),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}], []),
    ],
)
def test_malformed_tools_are_refused(tokenizer, messages, tools):
    with pytest.raises(ConfigError):
        tool_prompt(tokenizer, messages, tools)


# -- forced calls ------------------------------------------------------------------------------------------------------

TREE = {
    "type": "function",
    "function": {
        "name": 'plant "it"',
        "parameters": {
            "type": "object",
            "properties": {"tree": {"$ref": "#/$defs/node"}},
            "required": ["tree"],
            "$defs": {
                "node": {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}
            },
        },
    },
}
NOTHING = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def compiler(tokenizer):
    from radixkv.engine.structure import StructureCompiler

    return StructureCompiler(tokenizer)


def accepts(tokenizer, compiler, structure, answer):
    """Whether a structure lets exactly this answer through."""
    matcher = compiler.matcher(structure)
    for token_id in tokenizer.encode(answer).tolist():
        if not matcher.allowed()[token_id]:
            return False
        matcher.advance(token_id)
    return matcher.accepting


def test_a_forced_call_is_one_the_parser_reads(tokenizer, compiler):
    structure = forced_structure([WEATHER, TREE, NOTHING], "required")
    for name, arguments in (
        ("weather", '{"city": "Köln"}'),
        ('plant "it"', '{"tree": {"kids": [{"kids": []}]}}'),
        ("now", "{}"),
    ):
        answer = f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'
        assert accepts(tokenizer, compiler, structure, answer)
        assert read([answer]) == ("", [(name, json.loads(arguments))])
    for name, arguments in (("weather", "{}"), ("sky", "{}"), ("now", '{"x": 1}')):
        answer = f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        assert not accepts(tokenizer, compiler, structure, answer)
    assert not accepts(tokenizer, compiler, structure, "Hello")


def test_a_named_function_is_the_only_one_and_free_choices_force_nothing(tokenizer):
    named = forced_structure([WEATHER, NOTHING], {"type": "function", "function": {"name": "now"}})
    assert named == forced_structure([NOTHING], "required")
    assert forced_structure([WEATHER], "auto") is forced_structure([WEATHER], "none") is forced_structure([], None) is None


@pytest.mark.parametrize("choice", ["sometimes", 3, {"type": "function", "function": {"name": "sky"}}, {"function": "x"}])
def test_a_choice_that_cannot_be_is_refused(choice):
    with pytest.raises(ConfigError):
        forced_structure([WEATHER], choice)


def test_required_without_tools_is_refused():
    with pytest.raises(ConfigError):
        forced_structure([], "required")
