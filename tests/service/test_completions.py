"""Plain completions, tokens and models through a real process."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.model


def complete(http, prompt, **fields):
    return http.post("/v1/completions", json={"prompt": prompt, "temperature": 0, "max_tokens": 5, **fields})


def texts(response):
    return [choice["text"] for choice in response.json()["choices"]]


def ids(http, text):
    return http.post("/tokenize", json={"prompt": text}).json()["tokens"]


def test_openais_client_gets_a_completion(openai_client):
    answer = openai_client.completions.create(model="smollm2", prompt="One, two, three,", temperature=0, max_tokens=4)
    assert answer.choices[0].text.startswith(" four")
    assert answer.choices[0].finish_reason == "length"


def test_every_form_of_a_prompt_says_the_same(http):
    prompt, other = "One, two, three,", "Red, green,"
    whole = texts(complete(http, [prompt, other]))
    assert whole == texts(complete(http, [ids(http, prompt), ids(http, other)]))
    assert whole == texts(complete(http, prompt)) + texts(complete(http, ids(http, other)))
    usage = complete(http, [prompt, other]).json()["usage"]
    assert usage["prompt_tokens"] == len(ids(http, prompt)) + len(ids(http, other))
    assert usage["completion_tokens"] == 10


def test_echo_puts_the_prompt_in_front(http):
    assert texts(complete(http, "One, two,", echo=True, max_tokens=0)) == ["One, two,"]
    streamed = complete(http, ids(http, "One, two,"), echo=True, stream=True)
    lines = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    text = "".join(choice["text"] for line in lines[:-1] for choice in json.loads(line)["choices"])
    assert text == texts(complete(http, "One, two,", echo=True))[0]


def test_log_probabilities_say_where_each_token_stands(http):
    choice = complete(http, "One, two, three,", logprobs=2).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    for token, offset, top in zip(logprobs["tokens"], logprobs["text_offset"], logprobs["top_logprobs"], strict=True):
        assert choice["text"][offset:].startswith(token)
        assert len(top) == 2
        assert token in top


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "two"]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": ["x"] * 200}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_a_field_that_cannot_be_is_named(http, fields, param):
    response = complete(http, fields.pop("prompt", "x"), **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_tokens_go_to_text_and_back(http):
    text = "naïve 日本 🙂 <|im_end|>"
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 256 * 16
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_messages_are_tokenised_as_a_chat_would_be(http):
    messages = [{"role": "user", "content": "Hello"}]
    count = http.post("/tokenize", json={"messages": messages}).json()["count"]
    chat = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    assert count == chat["usage"]["prompt_tokens"]


def test_neither_text_nor_messages_cannot_be_tokenised(http):
    assert http.post("/tokenize", json={}).json()["error"]["param"] == "prompt"
    assert http.post("/detokenize", json={"tokens": [10**8]}).status_code == 400


def test_the_model_is_listed_under_its_name(openai_client, http):
    assert [model.id for model in openai_client.models.list()] == ["smollm2"]
    assert openai_client.models.retrieve("smollm2").max_model_len == 256 * 16
    missing = http.get("/v1/models/org/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
