"""Anthropic's Messages through a real process, with Anthropic's own client where it can say it."""

from __future__ import annotations

import json

import anthropic
import pytest

from radixkv.engine.tokenizer import Tokenizer
from radixkv.engine.tools import ToolCall
from radixkv.engine.transcripts import Transcripts
from radixkv_service.anthropic_blocks import Blocks
from radixkv_service.anthropic_dialog import shown, told
from radixkv_service.anthropic_models import MessagesInput
from radixkv_service.parsing import Piece

pytestmark = pytest.mark.model

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "description": "Weather of a city.", "input_schema": CITY}
GREEDY = {"temperature": 0}
EPHEMERAL = {"type": "ephemeral"}


@pytest.fixture
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="alice-key-1", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return Tokenizer(smollm2.path, "SmolLM2")


def ask(client, messages=CAPITAL, max_tokens=12, **fields):
    extra = GREEDY | fields.pop("extra", {})
    return client.messages.create(model="smollm2", messages=messages, max_tokens=max_tokens, extra_body=extra, **fields)


def post(http, **fields):
    return http.post("/v1/messages", json={"model": "smollm2", "messages": CAPITAL, "max_tokens": 2, **GREEDY, **fields})


def prompt_tokens(usage):
    return usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens


def events(response):
    """(event, data) of every event of a streamed response."""
    parts = [part.split("\n") for part in response.text.split("\n\n") if part]
    return [(first.removeprefix("event: "), json.loads(second.removeprefix("data: "))) for first, second in parts]


def test_an_answer_says_why_it_ended_and_its_input_tokens_add_up_to_the_prompt(client):
    answer = ask(client, extra={"cache_salt": "adds up"})
    assert [block.text for block in answer.content] == ["The capital of France is Paris."]
    assert (answer.stop_reason, answer.stop_sequence, answer.role) == ("end_turn", None, "assistant")
    counted = client.messages.count_tokens(model="smollm2", messages=CAPITAL).input_tokens
    assert prompt_tokens(answer.usage) == counted
    assert answer.usage.cache_read_input_tokens == 0
    assert answer.usage.cache_creation_input_tokens == counted // 16 * 16
    again = ask(client, extra={"cache_salt": "adds up"}, max_tokens=1)
    assert prompt_tokens(again.usage) == counted
    assert again.usage.cache_read_input_tokens >= counted // 16 * 16 - 1
    assert again.stop_reason == "max_tokens"


@pytest.mark.parametrize("city", ["Spain", "Peru and of Chile", "all the larger countries between here and the sea"])
def test_no_kind_of_input_tokens_is_ever_below_zero(client, city):
    asked = [{"role": "user", "content": f"What is the capital of {city}?"}]
    usage = ask(client, asked, 0, extra={"cache_salt": "kinds"}).usage
    kinds = (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens)
    assert min(kinds) >= 0
    assert sum(kinds) == client.messages.count_tokens(model="smollm2", messages=asked).input_tokens


def test_a_stream_is_these_events_and_says_what_the_whole_answer_says(client, http):
    response = post(http, max_tokens=12, stream=True)
    names = [name for name, _ in events(response)]
    assert names[:2] == ["message_start", "content_block_start"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert all(data["type"] == name for name, data in events(response))
    start = events(response)[0][1]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert start["usage"]["cache_read_input_tokens"] == int(response.headers["x-radixkv-cached-tokens"])
    with client.messages.stream(model="smollm2", messages=CAPITAL, max_tokens=12, extra_body=GREEDY) as stream:
        final = stream.get_final_message()
    assert final.content[0].text == "The capital of France is Paris."
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 8)
    assert prompt_tokens(final.usage) == prompt_tokens(ask(client, max_tokens=0).usage)


def test_a_stop_sequence_ends_the_answer_and_is_named(client):
    answer = ask(client, stop_sequences=[" of", "#"])
    assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("The capital", "stop_sequence", " of")


def test_no_tokens_at_all_warm_the_cache(client):
    warm = ask(client, max_tokens=0, extra={"cache_salt": "warm"})
    assert (warm.content, warm.usage.output_tokens, warm.stop_reason) == ([], 0, "max_tokens")
    assert ask(client, max_tokens=1, extra={"cache_salt": "warm"}).usage.cache_read_input_tokens >= 32


def test_blocks_of_text_are_one_text_and_so_is_the_system_prompt(client):
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    system = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief.", "cache_control": EPHEMERAL}]
    cut = client.messages.count_tokens(model="smollm2", system=system, messages=[{"role": "user", "content": parts}])
    whole = client.messages.count_tokens(model="smollm2", system="Be brief.", messages=CAPITAL)
    assert cut.input_tokens == whole.input_tokens


def test_a_tool_is_called_and_its_result_answered_over_the_cached_history(client):
    question = {"role": "user", "content": "What is the weather in Rome?"}
    fields = {"tools": [WEATHER], "extra": {"cache_salt": "tools", "temperature": 1, "seed": 3}}
    call = ask(client, [question], 40, tool_choice={"type": "any"}, **fields)
    (block,) = call.content
    assert (call.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "weather")
    assert block.input["city"] in ("Paris", "Rome")
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "Rain."}]}
    turns = [question, {"role": "assistant", "content": [block.to_dict()]}, {"role": "user", "content": [result]}]
    answer = ask(client, turns, 1, **fields)
    assert answer.usage.cache_read_input_tokens >= prompt_tokens(call.usage) + call.usage.output_tokens - 17


def test_a_streamed_call_comes_whole_as_json(http):
    response = post(http, tools=[WEATHER], tool_choice={"type": "tool", "name": "weather"}, max_tokens=40, stream=True)
    names = [name for name, _ in events(response)]
    assert names == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    data = [data for _, data in events(response)]
    assert data[1]["content_block"]["input"] == {}
    assert data[2]["delta"]["type"] == "input_json_delta"
    assert json.loads(data[2]["delta"]["partial_json"])["city"] in ("Paris", "Rome")
    assert data[4]["delta"]["stop_reason"] == "tool_use"


def test_an_answer_obeys_a_schema(client):
    form = {"format": {"type": "json_schema", "schema": CITY}}
    assert json.loads(ask(client, max_tokens=24, output_config=form).content[0].text)["city"] == "Paris"


def test_an_answer_goes_on_where_its_client_began_it(http):
    begun = [*CAPITAL, {"role": "assistant", "content": "The capital of France is"}]
    answer = post(http, messages=begun, max_tokens=4).json()
    assert answer["content"] == [{"type": "text", "text": " Paris."}]
    spaced = post(http, messages=[*CAPITAL, {"role": "assistant", "content": "The "}])
    assert spaced.status_code == 400


def test_thinking_comes_as_a_block_of_its_own_unless_it_is_not_wanted():
    pieces = [Piece("Hm"), Piece("m."), Piece("", "Rain"), Piece("", "?", (ToolCall("a1", "weather", '{"city": "Rome"}'),))]
    blocks = Blocks(thinking=True)
    data = b"".join(one for piece in pieces for one in blocks.add(piece)) + b"".join(blocks.close())
    names = [line.removeprefix("event: ") for line in data.decode().split("\n") if line.startswith("event: ")]
    one = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert names == [*one[:2], *one[1:], *one[:2], *one[1:], *one]
    assert [block.type for block in blocks.blocks] == ["thinking", "text", "tool_use"]
    assert (blocks.blocks[0].thinking, blocks.blocks[1].text) == ("Hmm.", "Rain?")
    quiet = Blocks(thinking=False)
    for piece in pieces:
        assert all(b"thinking" not in event for event in quiet.add(piece))
    assert quiet.message() == blocks.message()


@pytest.mark.parametrize("tools", [[], [{**WEATHER, "cache_control": EPHEMERAL}]])
@pytest.mark.parametrize("system", [None, "You are a careful guide to the cities of Europe."])
def test_what_comes_before_a_breakpoint_is_the_same_tokens_whatever_follows(tokenizer, tools, system):
    def prompt(*, tail):
        blocks = [{"type": "text", "text": system, "cache_control": EPHEMERAL}] if system else None
        first = [{"type": "text", "text": "A long document, word by word.", "cache_control": {**EPHEMERAL, "ttl": "1h"}}]
        messages = [
            {"role": "user", "content": first},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Rome"}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": tail}]},
        ]
        given = shown(tokenizer, told(MessagesInput(messages=messages, system=blocks, tools=tools)))
        return given, Transcripts(tokenizer).prompt_ids(given.messages, tools=given.tools, marks=given.marks)

    given, one = prompt(tail="Rain.")
    _, other = prompt(tail="Sun, and then some clouds.")
    assert one.marks == other.marks
    assert len(one.marks) == len(given.breakpoints) == bool(tools) + bool(system) + 1
    assert all(stop > 0 for stop in one.marks)
    assert list(one.marks) == sorted(one.marks)
    longest = max(one.marks)
    assert one.ids[:longest].tolist() == other.ids[:longest].tolist()
    assert "word by" in tokenizer.decode(one.ids[:longest].array, False)


def test_breakpoints_are_taken_by_a_real_request_and_no_more_than_four(http):
    block = {"type": "text", "text": "Be brief.", "cache_control": {**EPHEMERAL, "ttl": "1h"}}
    fields = {"tools": [{**WEATHER, "cache_control": EPHEMERAL}], "system": [block], "cache_control": EPHEMERAL}
    assert post(http, **fields).status_code == 200
    five = post(http, system=[block] * 4, cache_control=EPHEMERAL)
    assert (five.status_code, five.json()["error"]["param"]) == (400, "cache_control")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": "warm"}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "messages[0].content[0]"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "bare"}]}, "tools[0].input_schema"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "2h"}}]},
         "system[0].cache_control.ttl"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"stop_sequences": [3]}, "stop_sequences[0]"),
        ({"session_id": "none"}, None),
    ],
)  # fmt: skip
def test_what_cannot_be_is_an_error_in_anthropics_form_that_names_it(http, fields, param):
    response = post(http, **fields)
    body = response.json()
    kind = "not_found_error" if param is None else "invalid_request_error"
    assert (response.status_code, body["type"], body["error"]["type"]) == (400 if param else 404, "error", kind)
    assert body["error"].get("param") == param
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]


def test_errors_of_the_gate_have_anthropics_form_too(server, http):
    with server.client(key=None) as nobody:
        refused = nobody.post("/v1/messages", json={}, headers={"x-api-key": "wrong"})
    large = http.post("/v1/messages", content=b" " * 400_000, headers={"content-type": "application/json"})
    told_as = [(one.status_code, one.json()["error"]["type"]) for one in (refused, large, http.get("/v1/messages/x"))]
    assert told_as == [(401, "authentication_error"), (413, "request_too_large"), (404, "not_found_error")]
    assert "error" in http.get("/v1/nothing").json()
    assert "type" not in http.get("/v1/nothing").json()


def test_anthropics_client_knows_the_errors(client):
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="claude", max_tokens=1, messages=CAPITAL)
    assert missing.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as long:
        ask(client, [{"role": "user", "content": "word " * 9000}])
    assert long.value.body["error"]["code"] == "context_length_exceeded"
    counting = [{"role": "user", "content": "Count to 1000."}]
    with pytest.raises(anthropic.APIStatusError) as broken:  # at once, or in the middle of the stream
        list(
            client.messages.create(
                model="smollm2", max_tokens=2000, messages=counting, stream=True, extra_body={"timeout": 0.7}
            )
        )
    assert broken.value.body["error"]["type"] == "timeout_error"


def test_fields_that_nobody_reads_are_named(http):
    response = post(http, betas=["x"], metadata={"user_id": "u"}, thinking={"type": "enabled", "budget_tokens": 1024})
    assert response.status_code == 200
    assert response.headers["x-radixkv-ignored"] == "betas"
