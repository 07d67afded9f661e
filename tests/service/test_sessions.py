"""Sessions over HTTP: the same prompts as resent histories, a turn at a time, a tenant's own."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import anthropic
import pytest

from radixkv.engine.session_store import SessionStore
from radixkv.engine.tokenizer import Tokenizer
from radixkv.engine.transcripts import Transcripts
from radixkv.errors import SessionNotFound
from radixkv_service.errors import problem_of

pytestmark = pytest.mark.model


def opened(http, **fields):
    response = http.post("/v1/sessions", json=fields)
    assert response.status_code == 200, response.text
    return response.json()["id"]


def user(text):
    return {"role": "user", "content": text}


def say(http, session_id, text, **fields):
    body = {"session_id": session_id, "messages": [user(text)], "max_tokens": 2, "temperature": 0, **fields}
    return http.post("/v1/chat/completions", json=body)


def reuse(usage):
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def test_turns_through_a_session_cost_what_the_resent_history_costs(http):
    letters = [
        http.post("/tokenize", json={"prompt": one, "add_special_tokens": False}).json()["tokens"][0] for one in "ethan"
    ]
    sampled = {"temperature": 1.6, "seed": 5, "max_tokens": 10, "logprobs": True}
    sampled["logit_bias"] = {str(token_id): 100 for token_id in letters}  # words that the tokenizer cuts otherwise
    session_id = opened(http, system="Rhyme.", cache_salt="by-session")
    history = [{"role": "system", "content": "Rhyme."}]
    for text in ("A poem on rain!", "Of snow?", "Again."):
        one = say(http, session_id, text, cache_salt="by-session", **sampled).json()
        history.append(user(text))
        other = http.post("/v1/chat/completions", json={"messages": history, "cache_salt": "by-messages", **sampled}).json()
        answer = other["choices"][0]["message"]["content"]
        assert one["choices"][0]["message"]["content"] == answer
        assert reuse(one["usage"]) == reuse(other["usage"])
        history.append({"role": "assistant", "content": answer})
        generated = [token["token"] for token in other["choices"][0]["logprobs"]["content"]]
        again = http.post("/tokenize", json={"prompt": answer, "add_special_tokens": False, "return_token_strs": True})
        assert again.json()["token_strs"] != generated
    assert reuse(one["usage"])[1] >= 48
    session = http.get(f"/v1/sessions/{session_id}", headers={"x-cache-salt": "by-session"}).json()
    assert session["messages"] == history
    assert (session["num_turns"], session["busy"]) == (3, False)
    assert session["num_tokens"] > reuse(one["usage"])[0]
    assert 0 < session["expires_in_s"] <= session["ttl_s"] == 3600


def test_messages_and_chat_completions_take_turns_in_one_session(http, server):
    session_id = opened(http, messages=[user("Hi!"), {"role": "assistant", "content": "Hello!"}])
    first = say(http, session_id, "One?").json()["usage"]
    with anthropic.Anthropic(base_url=server.url, api_key="alice-key-1", max_retries=0) as client:
        second = client.messages.create(
            model="smollm2", max_tokens=2, messages=[user("Two?")], extra_headers={"x-session-id": session_id}
        ).usage
    total = second.input_tokens + second.cache_read_input_tokens + second.cache_creation_input_tokens
    assert total > first["prompt_tokens"] + first["completion_tokens"]
    assert second.cache_read_input_tokens >= 32
    roles = [message["role"] for message in http.get(f"/v1/sessions/{session_id}").json()["messages"]]
    assert roles == ["user", "assistant"] * 3


def test_a_rewound_turn_was_never_said_and_a_fork_goes_its_own_way(http):
    session_id = opened(http)
    say(http, session_id, "One?")
    first = say(http, session_id, "Two?").json()["usage"]
    other = http.post(f"/v1/sessions/{session_id}/fork").json()["id"]
    view = http.post(f"/v1/sessions/{session_id}/rewind", json={"turns": 1}).json()
    assert (view["num_turns"], view["num_messages"]) == (1, 2)
    again = say(http, session_id, "Two?").json()["usage"]
    assert again["prompt_tokens"] == first["prompt_tokens"]
    assert reuse(again)[1] == first["prompt_tokens"] - 1 or reuse(again)[1] >= reuse(first)[1]
    assert http.get(f"/v1/sessions/{other}").json()["num_turns"] == 2
    too_many = http.post(f"/v1/sessions/{session_id}/rewind", json={"turns": 3})
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "turns")


def test_what_is_appended_belongs_to_the_next_turn(http):
    session_id = opened(http)
    view = http.post(f"/v1/sessions/{session_id}/messages", json={"messages": [user("A first part.")]}).json()
    assert (view["num_messages"], view["num_turns"]) == (1, 0)
    usage = say(http, session_id, "And a second.", max_tokens=0).json()["usage"]
    resent = {"messages": [user("A first part."), user("And a second.")], "max_tokens": 0}
    assert usage["prompt_tokens"] == http.post("/v1/chat/completions", json=resent).json()["usage"]["prompt_tokens"]
    assert http.get(f"/v1/sessions/{session_id}").json()["num_messages"] == 1  # max_tokens=0 warms, and says nothing


def test_half_a_character_is_kept_out_of_answers(http):
    said = r'{"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x\udfff"}]}'
    response = http.post("/v1/sessions", content=said, headers={"content-type": "application/json"})
    session = http.get(f"/v1/sessions/{response.json()['id']}").json()
    assert [message["content"] for message in session["messages"]] == ["?", "x?"]


def test_a_turn_that_fails_leaves_the_session_as_it_was(http):
    session_id = opened(http)
    for fields in ({"timeout": 0.01}, {"logit_bias": {"99999999": 1}}, {"messages": [user("word " * 9000)]}):
        assert say(http, session_id, "Hello?", **{"max_tokens": 400, **fields}).status_code in (400, 504)
    late = say(http, session_id, "Hello?", stream=True, timeout=1.5, max_tokens=2000, ignore_eos=True)
    assert "event: error" in late.text or late.status_code == 504
    session = http.get(f"/v1/sessions/{session_id}").json()
    assert (session["messages"], session["busy"]) == ([], False)
    assert say(http, session_id, "Hello?").status_code == 200


def test_one_turn_at_a_time_and_a_client_that_leaves_ends_its_own(http, server):
    session_id = opened(http)
    body = {"session_id": session_id, "messages": [user("Count.")], "max_tokens": 2000, "ignore_eos": True, "stream": True}
    headers = {"x-request-id": "leaves-early"}
    with server.client() as other, other.stream("POST", "/v1/chat/completions", json=body, headers=headers) as stream:
        lines = stream.iter_lines()
        next(lines)
        busy = say(http, session_id, "Me too!")
        assert (busy.status_code, busy.json()["error"]["code"]) == (409, "session_busy")
        assert http.get(f"/v1/sessions/{session_id}").json()["busy"]
    server.wait_for("id=leaves-early .*status=499")
    assert say(http, session_id, "Me now!").status_code == 200


def test_an_answer_of_a_session_that_was_closed_is_still_sent(http):
    session_id = opened(http)
    body = {"session_id": session_id, "messages": [user("Hi!")], "max_tokens": 3, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert http.delete(f"/v1/sessions/{session_id}").json() == {"id": session_id, "object": "session", "deleted": True}
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert say(http, session_id, "Hi?").json()["error"]["code"] == "session_not_found"


def test_sessions_of_other_tenants_and_salts_are_not_there(http, bob):
    session_id, salted = opened(http), opened(http, cache_salt="mine")
    for client, name, headers in ((bob, session_id, {}), (bob, salted, {"x-cache-salt": "mine"}), (http, salted, {})):
        path = f"/v1/sessions/{name}"
        responses = [
            client.get(path, headers=headers),
            client.delete(path, headers=headers),
            client.post(f"{path}/fork", headers=headers),
            client.post(f"{path}/rewind", headers=headers, json={}),
            client.post(f"{path}/messages", headers=headers, json={"messages": [user("x")]}),
            client.post("/close_session", headers=headers, json={"session_id": name}),
            say(client, name, "x"),
        ]
        assert {one.status_code for one in responses} == {404}
        assert {one.json()["error"]["code"] for one in responses} == {"session_not_found"}
    assert session_id not in [one["id"] for one in bob.get("/v1/sessions").json()["data"]]
    listed = [one["id"] for one in http.get("/v1/sessions").json()["data"]]
    assert session_id in listed
    assert salted not in listed
    mine = http.get("/v1/sessions", headers={"x-cache-salt": "mine"}).json()["data"]
    assert [one["id"] for one in mine] == [salted]


def test_sglangs_names_open_and_close(http):
    session_id = http.post("/open_session", json={"capacity_of_str_len": 1000}).json()
    assert http.get(f"/v1/sessions/{session_id}").json()["num_tokens"] == 0
    assert http.post("/close_session", json={"session_id": session_id}).status_code == 200
    assert http.get(f"/v1/sessions/{session_id}").status_code == 404
    assert http.post("/open_session", json={"session_id": "mine"}).json()["error"]["param"] == "session_id"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"ttl_s": 0}, "ttl_s"),
        ({"ttl_s": 1e12}, "ttl_s"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"tools": []}, "tools"),
    ],
)
def test_a_session_that_cannot_be_is_a_400_that_names_the_field(http, fields, param):
    response = http.post("/v1/sessions", json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("fields", [{"n": 2}, {"tools": [{"type": "function", "function": {"name": "f"}}]}])
def test_what_a_session_cannot_do_is_named(http, fields):
    response = say(http, opened(http), "x", **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, next(iter(fields)))


def test_a_session_whose_time_is_over_is_a_404(smollm2):
    now_s = [0.0]
    store = SessionStore(Transcripts(Tokenizer(smollm2.path, "SmolLM2")), clock=lambda: now_s[0])
    session_id = store.open("alice", ttl_s=60)
    now_s[0] = 59.0
    assert store.messages(session_id, "alice") == []
    now_s[0] = 118.0
    assert store.info(session_id, "alice").expires_in_s == 1.0
    now_s[0] = 119.0
    with pytest.raises(SessionNotFound) as gone:
        store.info(session_id, "alice")
    assert problem_of(gone.value).status == 404


def test_64_sessions_at_once_keep_apart(server):
    def talk(number):
        with server.client() as client:
            session_id = opened(client)
            usages = [say(client, session_id, text, max_tokens=1) for text in ("Hi!", f"I am {number}.")]
            assert {one.status_code for one in usages} == {200}, usages
            messages = client.get(f"/v1/sessions/{session_id}").json()["messages"]
            client.delete(f"/v1/sessions/{session_id}")
            return [one.json()["usage"] for one in usages], json.dumps(messages)

    with ThreadPoolExecutor(64) as pool:
        told = list(pool.map(talk, range(100, 164)))
    for number, ((first, second), messages) in enumerate(told, 100):
        assert f"I am {number}." in messages
        assert messages.count('"role"') == 4
        assert second["prompt_tokens"] > first["prompt_tokens"]
        assert reuse(second)[1] >= 32
