"""What is too much is refused at once and by one error; what is cut short is no text; a prompt counts once."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, ValidationError

from radixkv.engine import Engine
from radixkv_service.anthropic_models import MessagesRequest
from radixkv_service.openai_models import ChatRequest, CompletionRequest
from radixkv_service.prompt_limits import longest_token_bytes
from radixkv_service.session_models import OpenSession
from radixkv_service.tokenization import DetokenizeRequest, TokenizeRequest
from tests.service.test_metrics import scrape
from tests.service.test_tools import ASKED, FORCED, WEATHER

MANY = [{}] * 1000


# -- bodies that are no request ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": MANY}),
        (CompletionRequest, {"prompt": [MANY] * 1000}),
        (CompletionRequest, {"prompt": [*range(1000), {}, *MANY]}),
        (CompletionRequest, {"prompt": "x", "stop": [1] * 1000}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": MANY}),
        (CompletionRequest, {"prompt": "x", "logit_bias": {str(number): "" for number in range(1025)}}),
        (ChatRequest, {"messages": MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": MANY}]}),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": MANY}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": "x"}], "tools": MANY}),
        (MessagesRequest, {"max_tokens": 1, "messages": MANY}),
        (MessagesRequest, {"max_tokens": 1, "messages": [{"role": "user", "content": MANY}]}),
        (MessagesRequest, {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "system": MANY}),
        (MessagesRequest, {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "tools": MANY}),
        (TokenizeRequest, {"messages": MANY}),
        (DetokenizeRequest, {"tokens": MANY}),
        (OpenSession, {"messages": MANY}),
        (OpenSession, {str(number): 0 for number in range(1000)}),
    ],
)
def test_a_body_that_is_wrong_throughout_is_a_few_errors(kind: type[BaseModel], body):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 8


def test_as_many_biases_as_may_be_are_read():
    bias = {str(number): 1.0 for number in range(1024)}
    assert CompletionRequest(prompt="x", logit_bias=bias).logit_bias == bias


@pytest.mark.model
def test_a_body_of_wrong_elements_is_a_400_that_names_the_field(http):
    for path, field in {"/v1/completions": "prompt", "/v1/chat/completions": "messages", "/v1/messages": "messages"}.items():
        response = http.post(path, json={field: [{}] * 60_000, "max_tokens": 1})
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith(field)
        assert len(response.content) < 1000


# -- prompts that no context holds -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(serving):
    """A server whose pool holds 128 tokens."""
    with serving("--num-pages", "8") as server:
        server.wait_for(r"INFO ready:")
        with server.client(None) as client:
            yield client


@pytest.mark.model
def test_no_token_of_a_vocabulary_is_longer_than_the_longest():
    with Engine("smollm2", dtype="float32", num_pages=4) as engine:
        tokenizer = engine.tokenizer
        longest = longest_token_bytes(tokenizer)
        assert longest == 81
        for text in ("\n" + " " * 400, "\U0001f30a" * 50, "the sea and the wind " * 20):
            assert len(tokenizer.encode(text)) >= len(text.encode()) // longest


SPACES = "\n" + " " * 40_000
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"x": SPACES})}}


@pytest.mark.model
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": SPACES}),
        ("/v1/completions", {"prompt": ["x", SPACES]}),
        ("/v1/completions", {"prompt": [1] * 129}),
        ("/v1/completions", {"prompt": [[1], [1] * 129]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": SPACES}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 129}),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [CALL]}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": SPACES}]}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": SPACES}], "max_tokens": 1}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "system": SPACES, "max_tokens": 1}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": SPACES}]}),
        ("/v1/sessions", {"messages": [{"role": "user", "content": SPACES}]}),
        ("/tokenize", {"prompt": SPACES}),
        ("/tokenize", {"messages": [{"role": "user", "content": SPACES}]}),
        ("/detokenize", {"tokens": [1] * 513}),
    ],
)
def test_what_no_context_holds_is_refused_by_its_size(small, path, body):
    response = small.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert response.json()["error"]["param"] == next(name for name in ("prompt", "messages", "tokens") if name in body)
    assert "are read here" in response.json()["error"]["message"]


@pytest.mark.model
def test_what_is_too_long_to_answer_is_still_counted(small):
    ids = small.post("/tokenize", json={"prompt": "word " * 300}).json()
    assert ids["count"] == len(ids["tokens"]) > ids["max_model_len"] == 128
    assert small.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": "word " * 300}
    body = {"messages": [{"role": "user", "content": "word " * 300}]}
    assert small.post("/v1/messages/count_tokens", json=body).json()["input_tokens"] > 128


# -- calls that are cut ------------------------------------------------------------------------------------------------


def streamed(http, path, body):
    """The parsed events of a stream."""
    lines = http.post(path, json={**body, "stream": True}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


@pytest.mark.model
@pytest.mark.parametrize("max_tokens", [1, 3, 12])
def test_a_forced_call_that_is_cut_is_no_text(http, max_tokens):
    body = {"messages": ASKED, "tools": [WEATHER], "tool_choice": FORCED, "temperature": 0, "max_tokens": max_tokens}
    (choice,) = http.post("/v1/chat/completions", json=body).json()["choices"]
    assert (choice["message"]["content"], choice["message"].get("tool_calls")) == ("", None)
    assert choice["finish_reason"] == "length"
    chunks = [chunk["choices"][0] for chunk in streamed(http, "/v1/chat/completions", body)]
    assert not any(chunk["delta"].get("content") or chunk["delta"].get("tool_calls") for chunk in chunks)
    assert chunks[-1]["finish_reason"] == "length"


@pytest.mark.model
def test_a_forced_call_that_is_cut_is_no_block(http):
    tool = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}
    body = {"messages": ASKED, "tools": [tool], "tool_choice": {"type": "any"}, "temperature": 0, "max_tokens": 5}
    answer = http.post("/v1/messages", json=body).json()
    assert (answer["content"], answer["stop_reason"]) == ([], "max_tokens")
    assert not [one for one in streamed(http, "/v1/messages", body) if one["type"].startswith("content_block")]


SAID = 'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def opened():
    """Makes the parser of an answer to WEATHER that may call or not."""
    from radixkv.engine.sampling import SamplingParams
    from radixkv.engine.tools import ToolPrompt
    from radixkv.engine.transcripts import Transcripts
    from radixkv.tokens import Tokens
    from radixkv_service.dialog import Dialog
    from radixkv_service.parsing import AnswerParser

    with Engine("smollm2", dtype="float32", num_pages=4) as engine:
        transcripts = Transcripts(engine.tokenizer)
        (done,) = engine.generate([Tokens([1, 2, 3])], SamplingParams(max_tokens=1, ignore_eos=True))
        assert done.finish_reason == "length"
        dialog = Dialog(transcripts, ToolPrompt([], None), "", Tokens(), frozenset({"get_weather"}), None, parallel=True)
        yield lambda: AnswerParser(dialog), done


@pytest.mark.model
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_wherever_an_answer_is_cut_no_head_of_a_call_is_text(opened, step):
    make, done = opened
    for end in range(len(SAID) + 1):
        said, parser = SAID[:end], make()
        pieces = [parser.push(said[at : at + step]) for at in range(0, end, step)]
        pieces.append(parser.push("", done))
        text = "".join(piece.text for piece in pieces)
        head = SAID.index("<tool")
        if end >= head + len("<tool"):
            assert text == "Let me look."
            assert parser.cut == (parser.num_calls == 0)
        else:
            assert (text, parser.cut) == (said, False)
    assert parser.num_calls == 1


@pytest.mark.model
def test_text_that_only_looks_like_the_head_of_a_call_stays(opened):
    make, done = opened
    for text in ("a < b and b <", "see <tool_call> in the docs", '{"name": "Ada", "age": 3', "[1, 2", "<table>"):
        parser = make()
        assert parser.push(text, done).text == text
        assert not parser.cut
    parser = make()
    assert parser.push('{"name": "get_weather", "parameters": {"ci', done).text == ""
    assert parser.cut


# -- counted once ------------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_a_prompt_with_several_answers_counts_once_and_siblings_are_no_hits(http):
    body = {"messages": [{"role": "user", "content": "count once " * 30}], "max_tokens": 2, "n": 3, "ignore_eos": True}
    for hit in (False, True):
        before = scrape(http)
        usage = http.post("/v1/chat/completions", json=body).json()["usage"]
        after = scrape(http)
        moved = {name: after[name] - before.get(name, 0) for name in after}
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert (cached > usage["prompt_tokens"] / 2) == hit
        assert moved["radixkv:tenant_prompt_tokens_total"] == usage["prompt_tokens"]
        assert moved["radixkv:tenant_cached_tokens_total"] == cached
        assert moved["radixkv:tenant_output_tokens_total"] == usage["completion_tokens"] == 6
        assert moved["vllm:request_success_total"] == 3
        assert moved["vllm:prompt_tokens_total"] == 3 * usage["prompt_tokens"]


# -- sessions without a body -------------------------------------------------------------------------------------------


@pytest.mark.model
def test_a_session_is_opened_without_a_body(http):
    for path in ("/open_session", "/v1/sessions"):
        response = http.post(path)
        assert response.status_code == 200, response.text
        opened = response.json()
        session_id = opened if isinstance(opened, str) else opened["id"]
        assert http.delete(f"/v1/sessions/{session_id}").status_code == 200
    assert http.post("/open_session", json={"session_id": "mine"}).status_code == 400
