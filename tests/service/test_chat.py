"""Chat completions through a real process, with OpenAI's own client where it can say it."""

from __future__ import annotations

import json

import openai
import pytest

pytestmark = pytest.mark.model

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


def ask(http, **fields):
    return http.post("/v1/chat/completions", json={"messages": CAPITAL, "temperature": 0, "max_tokens": 8, **fields})


def events(response):
    """The data of every event of a streamed response, and whether it ended as it should."""
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(one) for one in data[:-1]]


def test_openais_client_gets_an_answer_and_its_usage(openai_client):
    answer = openai_client.chat.completions.create(model="smollm2", messages=CAPITAL, temperature=0, max_tokens=12)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_a_stream_says_what_the_whole_answer_says(openai_client):
    stream = openai_client.chat.completions.create(
        model="smollm2", messages=CAPITAL, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "The capital of France is Paris."
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 8


def test_a_repeated_prompt_is_cached_and_says_so_in_header_and_usage(http):
    first = ask(http, cache_salt="repeated")
    again = ask(http, cache_salt="repeated")
    assert first.headers["x-radixkv-cached-tokens"] == "0"
    usage = again.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == (usage["prompt_tokens"] - 1) // 16 * 16 > 0
    assert again.headers["x-radixkv-cached-tokens"] == str(usage["prompt_tokens_details"]["cached_tokens"])
    assert first.json()["usage"]["prompt_tokens_details"]["created_cache_tokens"] > 0
    assert first.json()["choices"] == again.json()["choices"]


def test_continuous_usage_says_cached_tokens_from_the_first_chunk_on(http):
    ask(http, cache_salt="live")
    chunks = events(ask(http, cache_salt="live", stream=True, stream_options={"continuous_usage_stats": True}))
    assert all("usage" in chunk for chunk in chunks)
    usage = chunks[0]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == (usage["prompt_tokens"] - 1) // 16 * 16 > 0
    assert chunks[-1]["usage"]["completion_tokens"] == 8


def test_a_resent_history_is_found_up_to_the_new_message(http):
    turn = [{"role": "user", "content": "Write a short poem about rain."}]
    first = http.post("/v1/chat/completions", json={"messages": turn, "seed": 7, "temperature": 1.5, "max_tokens": 40})
    said = first.json()["choices"][0]["message"]
    usage = first.json()["usage"]
    turns = [*turn, {"role": "assistant", "content": said["content"]}, {"role": "user", "content": "And of snow?"}]
    second = http.post("/v1/chat/completions", json={"messages": turns, "temperature": 0, "max_tokens": 4}).json()["usage"]
    kept = usage["prompt_tokens"] + usage["completion_tokens"]
    assert second["prompt_tokens_details"]["cached_tokens"] >= kept - 17  # a page, and the last token, which has no KV


def test_several_choices_share_their_prompt_and_a_seed_repeats_them(http):
    fields = {"n": 3, "temperature": 1.0, "seed": 11, "max_tokens": 6, "cache_salt": "choices"}
    first, again = ask(http, **fields).json(), ask(http, **fields, stream=True)
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in events(again):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts
    assert first["usage"]["prompt_tokens"] == ask(http, max_tokens=1).json()["usage"]["prompt_tokens"]


def test_log_probabilities_are_of_the_tokens_that_make_the_text(openai_client):
    answer = openai_client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Repeat exactly: naïve 日本 🙂"}],
        temperature=0,
        max_tokens=24,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    details = answer.choices[0].logprobs.content
    assert len(details) == answer.usage.completion_tokens == 24
    for detail in details:
        assert len(detail.top_logprobs) == 3
        assert detail.top_logprobs[0].logprob >= detail.logprob - 1e-6
        assert bytes(detail.bytes).decode("utf-8", "replace") == detail.token
    text = b"".join(bytes(detail.bytes) for detail in details).decode("utf-8", "replace")
    shown = text.replace("<|im_end|>", "").replace("<|im_start|>", "")
    assert answer.choices[0].message.content in shown


def test_max_completion_tokens_wins_over_max_tokens(http):
    assert ask(http, max_tokens=2, max_completion_tokens=5).json()["usage"]["completion_tokens"] == 5


def test_no_tokens_at_all_warm_the_cache(http):
    warm = ask(http, max_tokens=0, cache_salt="warm")
    assert warm.status_code == 200
    assert warm.json()["usage"]["completion_tokens"] == 0
    usage = ask(http, cache_salt="warm").json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 32


def test_a_stop_text_ends_the_answer_and_is_named(http):
    choice = ask(http, stop=[" of"]).json()["choices"][0]
    assert choice["message"]["content"] == "The capital"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " of")


def test_a_bias_of_minus_100_forbids_a_token(http):
    paris = http.post("/tokenize", json={"prompt": " Paris"}).json()["tokens"]
    text = ask(http, logit_bias={str(paris[0]): -100}, max_tokens=12).json()["choices"][0]["message"]["content"]
    assert "Paris" not in text


def test_parts_of_text_are_one_text(http):
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    whole, cut = ask(http), ask(http, messages=[{"role": "user", "content": parts}])
    assert whole.json()["choices"] == cut.json()["choices"]
    assert whole.json()["usage"]["prompt_tokens"] == cut.json()["usage"]["prompt_tokens"]


def test_tenants_and_salts_share_nothing(http, bob):
    ask(http, cache_salt="mine")
    for client, salt in ((bob, "mine"), (http, "other"), (bob, None)):
        fields = {"cache_salt": salt} if salt else {"messages": [{"role": "user", "content": "Of bob alone, please."}]}
        assert ask(client, **fields).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_fields_that_nobody_reads_are_named(http):
    response = ask(http, best_effort=True, **{"we\u00efrd\n": 1})
    assert response.headers["x-radixkv-ignored"] == "?, best_effort"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": 3000}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"stop": ["ok", 3]}, "stop[1]"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1e9}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"prompt_cache_retention": "forever"}, "prompt_cache_retention"),
        ({"priority": 1000}, "priority"),
        ({"timeout": 0}, "timeout"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_a_field_that_cannot_be_is_named(http, fields, param):
    response = ask(http, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)


def test_errors_are_those_that_openais_client_knows(openai_client):
    with pytest.raises(openai.NotFoundError) as missing:
        openai_client.chat.completions.create(model="gpt-4", messages=CAPITAL)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        openai_client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": "word " * 9000}])
    assert long.value.code == "context_length_exceeded"


def test_a_request_whose_time_is_over_ends_with_504_and_in_a_stream_with_an_error_event(http, openai_client):
    late = ask(http, timeout=0.02, max_tokens=400, ignore_eos=True)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    header = http.post(
        "/v1/chat/completions", json={"messages": CAPITAL, "max_tokens": 400}, headers={"x-request-timeout": "0.02"}
    )
    assert header.status_code == 504
    stream = openai_client.chat.completions.create(
        model="smollm2", messages=CAPITAL, max_tokens=2000, stream=True, extra_body={"timeout": 1.5, "ignore_eos": True}
    )
    with pytest.raises(openai.APIError) as broken:
        list(stream)
    assert broken.value.code == "deadline_exceeded"
