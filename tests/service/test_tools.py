"""Calls of tools and answers of a given form, through a real process."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.model

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ASKED = [{"role": "user", "content": "What is the weather in Oslo?"}]
FORCED = {"type": "function", "function": {"name": "get_weather"}}


def test_a_forced_call_is_a_call_with_arguments_of_its_schema(openai_client):
    answer = openai_client.chat.completions.create(
        model="smollm2", messages=ASKED, tools=[WEATHER], tool_choice=FORCED, temperature=0, max_tokens=64
    )
    choice = answer.choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")


def test_a_streamed_call_is_the_same_call(openai_client):
    fields = {"model": "smollm2", "messages": ASKED, "tools": [WEATHER], "tool_choice": "required", "temperature": 0}
    whole = openai_client.chat.completions.create(**fields, max_tokens=64).choices[0]
    chunks = [chunk.choices[0] for chunk in openai_client.chat.completions.create(**fields, max_tokens=64, stream=True)]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls] == [(0, "get_weather")]
    assert calls[0].function.arguments == whole.message.tool_calls[0].function.arguments
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].finish_reason == "tool_calls"


def test_the_turn_after_a_call_finds_the_call_in_the_cache(http):
    fields = {"tools": [WEATHER], "temperature": 0, "max_tokens": 64, "cache_salt": "tools"}
    body = {"messages": ASKED, "tool_choice": "required", **fields}
    first = http.post("/v1/chat/completions", json=body).json()
    said = first["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "Rain."}
    second = http.post("/v1/chat/completions", json={"messages": [*ASKED, said, result], **fields, "max_tokens": 1}).json()
    kept = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= kept - 17


def test_a_schema_holds_the_answer(openai_client):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = openai_client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Invent a person."}],
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
        max_tokens=64,
        temperature=1.0,
        seed=3,
    )
    person = json.loads(answer.choices[0].message.content)
    assert set(person) == {"name", "age"}
    assert person["name"] in ("Ada", "Bob")
    assert 1 <= person["age"] <= 99


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
    ],
)
def test_tools_that_cannot_be_are_named(http, fields, param):
    response = http.post("/v1/chat/completions", json={"messages": ASKED, "max_tokens": 1, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
