"""Conversations as exact ids: resent messages equal a session's, with thinking, tools, marks, and templates that object."""

from __future__ import annotations

import shutil
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv import errors
from radixkv.engine import Completion, SamplingParams
from radixkv.engine.conversation import Splicer
from radixkv.engine.layout import common_characters
from radixkv.engine.messages import canonical_message, canonical_tools, part_end, rendered_message, text_of
from radixkv.engine.thinking import ThinkingTags, num_thinking_tokens, spoken_text
from radixkv.engine.tokenizer import Tokenizer
from radixkv.engine.transcripts import Transcripts

pytestmark = pytest.mark.model
END = 2  # <|im_end|>
SYSTEM = {"role": "system", "content": "Answer in one word."}
HELLO = {"role": "user", "content": "Hello, 42!"}
MORE = {"role": "user", "content": "And now?"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2.0}'}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "3"}

CHATML = "<|im_start|>{role}\n{content}<|im_end|>\n"
DROPS = """
{%- set ns = namespace(last=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
{%- set content = m.content -%}
{%- set thought = '' -%}
{%- if m.role == 'assistant' and '</think>' in content -%}
  {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
  {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if thought and loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif -%}
{{- content -}}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + opening }}{% endif -%}
"""
HYBRID = "{%- set opening = '' -%}" + DROPS
OPENS = "{%- set opening = '<think>\\n' -%}" + DROPS
FIELD = HYBRID.replace("{%- set thought = '' -%}", "{%- set thought = m.reasoning_content or '' -%}")


@pytest.fixture(scope="module")
def plain(smollm2):
    return Tokenizer(smollm2.path, "SmolLM2")


@pytest.fixture
def templated(smollm2, tmp_path):
    """The real tokenizer with another chat template."""

    def make(template: str) -> Tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
            shutil.copy(smollm2.path / name, tmp_path)
        (tmp_path / "chat_template.jinja").write_text(template)
        return Tokenizer(tmp_path)

    return make


def completed(ids, text="", stopped_by=None):
    return Completion(text, tuple(ids), "stop", 1, 0, 1, 0.0, 0.0, stopped_by=stopped_by)


def generated(tokenizer, text, *, by_character=True, end=True):
    """Ids of a text, cut otherwise than the tokenizer would, as models often do."""
    pieces = text if by_character else [text]
    ids = [token for piece in pieces for token in tokenizer.encode(piece, special=False).tolist()]
    return completed([*ids, END] if end else ids, text)


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def chat(*roles_and_texts):
    return "".join(CHATML.format(role=role, content=text) for role, text in roles_and_texts) + "<|im_start|>assistant\n"


# -- the same as a session ---------------------------------------------------------------------------------------------


def test_resent_messages_are_the_very_ids_a_session_keeps_and_hit_as_far(fp32_engine):
    engine, differed = fp32_engine, 0
    engine.cache.flush()
    transcripts = Transcripts(engine.tokenizer)
    with engine.chat("You are a poet who mixes languages.") as session:
        for question in ("A word for snow?", "  Another, with 42 emojis!\n", "Again."):
            history = [*session.messages, {"role": "user", "content": question}]
            prompt = transcripts.prompt_ids(history)
            for seed in range(40):
                done = session.send(question, SamplingParams(max_tokens=10, temperature=1.8, seed=seed))
                said = done.token_ids[: -1 if done.token_ids[-1] == END else None]
                if engine.tokenizer.encode(done.text, special=False).tolist() != list(said):
                    differed += 1
                    break
                session.rewind()
            assert session.tokens[: done.prompt_tokens] == prompt.ids
            transcripts.remember(history, answer(done.text), done)
        last = [*session.messages, MORE]
    assert differed == 3
    prompt = transcripts.prompt_ids(last)
    assert prompt.spliced == (2, 4, 6)
    resent = engine.generate(prompt.ids, SamplingParams(max_tokens=1))[0]
    rendered = engine.generate(last, SamplingParams(max_tokens=1))[0]
    assert resent.cached_tokens >= len(session.tokens) - 16 > rendered.cached_tokens
    assert engine.cache.stats().num_leases == 0


@settings(max_examples=30, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.text("ab 1\n雪🙂<", max_size=12), st.text("xy. \n<7é", max_size=12), st.booleans()), max_size=4
    )
)
def test_the_text_of_a_spliced_prompt_is_the_rendered_text(plain, turns):
    transcripts, messages = Transcripts(plain), [SYSTEM]
    for question, said, end in turns:
        messages.append({"role": "user", "content": question})
        transcripts.remember(messages, answer(said), generated(plain, said, end=end))
        messages.append(answer(said))
    messages.append(HELLO)
    prompt = transcripts.prompt_ids(messages)
    assert prompt.spliced == tuple(range(2, len(messages) - 1, 2))
    assert plain.decode(prompt.ids.tolist(), skip_special=False) == plain.chat_text(messages)


def test_without_known_answers_the_prompt_is_the_rendered_one(plain):
    messages = [SYSTEM, HELLO, answer("Yes."), MORE]
    prompt = Transcripts(plain).prompt_ids(messages)
    assert prompt.ids.tolist() == plain.chat_ids(messages).tolist()
    assert prompt.spliced == ()


def test_a_stop_text_is_not_put_before_the_model_again(plain):
    ids = plain.encode("Thought: add.\nObservation: 3", special=False).tolist()
    exact = Splicer(plain).exact(completed(ids, "Thought: add.\nObs", "ervation"))
    assert plain.decode(exact.ids.tolist()) == "Thought: add.\nObs"
    exact = Splicer(plain).exact(completed([*plain.encode("Yes").tolist(), 9], "Yes", 9))
    assert plain.decode(exact.ids.tolist()) == "Yes"


def test_an_end_the_template_does_not_write_gives_way(templated):
    tokenizer = templated("{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant] ")
    transcripts = Transcripts(tokenizer)
    transcripts.remember([HELLO], answer("Yes."), generated(tokenizer, "Yes."))
    prompt = transcripts.prompt_ids([HELLO, answer("Yes."), MORE])
    assert tokenizer.decode(prompt.ids.tolist(), False) == "[user] Hello, 42! [assistant] Yes. [user] And now? [assistant] "


# -- thinking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["<think>\nHm, 42?\n</think>\n\nYes.", "\n<think></think>Yes.", "<think>Hm</think>(Yes)"])
@pytest.mark.parametrize("by_character", [True, False])
def test_the_thinking_of_generated_ids_ends_with_its_closing_tag(plain, text, by_character):
    ids = list(generated(plain, text, by_character=by_character).token_ids)
    stop = num_thinking_tokens(ids, plain.decode)
    assert plain.decode(ids[:stop]).startswith(text.partition("</think>")[0] + "</think>")
    assert "</think>" not in plain.decode(ids[: stop - 1])
    spoken = Splicer(plain).exact(completed(ids)).spoken.tolist()
    assert plain.decode(spoken) == spoken_text(text) in ("Yes.", "(Yes)")
    assert spoken[-1] == END


def test_what_is_no_thinking_is_left_alone(plain):
    for text in ("Write </think> at the end.", "Yes.", "", "It is <think>Hm</think>."):
        ids = plain.encode(text).tolist()
        assert num_thinking_tokens(ids, plain.decode) == 0
        assert spoken_text(text) == text
    assert num_thinking_tokens(plain.encode("<think>Hm").tolist(), plain.decode) == len(plain.encode("<think>Hm"))
    inside = plain.encode("Hm</think>Yes").tolist()
    assert plain.decode(inside[: num_thinking_tokens(inside, plain.decode, opened=True)]).endswith("</think>")
    with pytest.raises(errors.ConfigError):
        ThinkingTags(closing="")


@pytest.mark.parametrize("template", [HYBRID, FIELD], ids=["in the content", "in a field"])
def test_dropped_thinking_leaves_the_very_ids_of_what_was_spoken(templated, template):
    tokenizer = templated(template)
    transcripts = Transcripts(tokenizer)
    done = generated(tokenizer, "<think>\nHm, 42?\n</think>\n\nYes, 42.")
    exact = transcripts.remember([HELLO], answer("Yes, 42.", reasoning_content="Hm, 42?"), done)
    forms = [
        answer("Yes, 42."),
        answer("Yes, 42.", reasoning_content="Hm, 42?"),
        answer("<think>\nHm, 42?\n</think>\n\nYes, 42."),
        answer([{"type": "text", "text": "Yes, "}, {"type": "text", "text": "42."}]),
    ]
    prompts = [transcripts.prompt_ids([HELLO, form, MORE]) for form in forms]
    assert all(prompt == prompts[0] for prompt in prompts)
    assert prompts[0].spliced == (1,)
    assert bytes(exact.spoken.data[:-4]) in prompts[0].ids.data
    text = tokenizer.decode(prompts[0].ids.tolist(), skip_special=False)
    assert text == chat(("user", "Hello, 42!"), ("assistant", "Yes, 42."), ("user", "And now?"))


@pytest.mark.parametrize("template", [HYBRID, OPENS, FIELD], ids=["hybrid", "opens", "in a field"])
def test_thinking_is_kept_until_the_user_speaks_again(templated, template):
    tokenizer = templated(template)
    transcripts = Transcripts(tokenizer)
    written = "" if template is OPENS else "<think>\n"
    done = generated(tokenizer, written + "Add.\n</think>\n\nadd(1, 2)")
    first = transcripts.prompt_ids([HELLO])
    calls = answer(None, tool_calls=[CALL])
    exact = transcripts.remember([HELLO], calls, done)
    second = transcripts.prompt_ids([HELLO, calls, RESULT])
    whole = (first.ids + exact.ids).data
    assert second.ids.data.startswith(whole), "a tool's result continues the very ids"
    third = transcripts.prompt_ids([HELLO, calls, RESULT, answer("3."), MORE])
    assert "Add." not in tokenizer.decode(third.ids.tolist())
    assert transcripts.dead_from(first, [HELLO], calls, exact) is None
    dead = transcripts.dead_from(first, [HELLO], answer("Yes."), exact)
    alive = first.ids.tolist()[:dead]
    assert tokenizer.decode(alive, skip_special=False) == chat(("user", "Hello, 42!"))
    assert third.ids.tolist()[:dead] == alive


def test_where_the_template_shows_thinking_all_of_it_is_kept(plain):
    transcripts = Transcripts(plain)
    done = generated(plain, "<think>\nHm.\n</think>\n\nYes.")
    first = transcripts.prompt_ids([HELLO])
    exact = transcripts.remember([HELLO], answer("Yes."), done)
    later = transcripts.prompt_ids([HELLO, answer("Yes."), MORE])
    assert later.ids.data.startswith((first.ids + exact.ids).data)
    assert transcripts.dead_from(first, [HELLO], answer("Yes."), exact) is None


def test_thinking_that_was_cut_leaves_an_empty_answer(templated):
    tokenizer = templated(HYBRID)
    transcripts = Transcripts(tokenizer)
    first = transcripts.prompt_ids([HELLO])
    exact = transcripts.remember([HELLO], answer(""), generated(tokenizer, "<think>\nHm, so", end=False))
    assert (len(exact.spoken), exact.num_thinking) == (0, len(exact.ids))
    later = transcripts.prompt_ids([HELLO, answer(None), MORE])
    assert later.spliced == (1,)
    text = tokenizer.decode(later.ids.tolist(), skip_special=False)
    assert text == chat(("user", "Hello, 42!"), ("assistant", ""), ("user", "And now?"))
    assert transcripts.dead_from(first, [HELLO], answer(""), exact) == len(first.ids)


# -- templates that object ---------------------------------------------------------------------------------------------


def test_a_message_whose_marking_changes_others_is_rendered_as_it_is(templated):
    tokenizer = templated(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ messages[loop.index0 - 1].tool_calls[0].function.name }}: "
        "{% endif %}{{ m.role }} {{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}\n{% endfor %}"
    )
    transcripts = Transcripts(tokenizer)
    calls = answer("Wait.", tool_calls=[CALL])
    messages = [HELLO, answer("Yes."), MORE, calls, RESULT, MORE]
    transcripts.remember(messages[:1], messages[1], generated(tokenizer, "Yes."))
    transcripts.remember(messages[:3], calls, generated(tokenizer, "Wait. add(1, 2)"))
    prompt = transcripts.prompt_ids(messages)
    assert prompt.spliced == (1,)
    assert tokenizer.decode(prompt.ids.tolist()) == tokenizer.chat_text([rendered_message(one) for one in messages])


def test_answers_that_a_template_hides_or_doubles_are_rendered_by_it(templated):
    tokenizer = templated("{% for m in messages %}{{ m.content | upper if loop.first else m.content }}|{% endfor %}")
    splicer = Splicer(tokenizer)
    exact = splicer.exact(generated(tokenizer, "yes", end=False))
    prompt = splicer.prompt([answer("yes"), HELLO, answer("yes")], {0: exact, 2: exact})
    assert prompt.spliced == (2,)
    assert tokenizer.decode(prompt.ids.tolist()) == "YES|Hello, 42!|yes|"
    tokenizer = templated("{{ messages[-1].content }}{{ messages[-1].content }}")
    assert Splicer(tokenizer).prompt([answer("yes")], {0: exact}).spliced == ()
    tokenizer = templated("{{ raise_exception('no') if 'yes' not in messages[0].content }}{{ messages[0].content }}")
    prompt = Splicer(tokenizer).prompt([answer("yes")], {0: exact})
    assert (prompt.spliced, tokenizer.decode(prompt.ids.tolist())) == ((), "yes")


def test_what_a_template_refuses_is_refused(templated, smollm2, tmp_path):
    tokenizer = templated("{{ raise_exception('roles must alternate') }}")
    exact = Splicer(tokenizer).exact(generated(tokenizer, "yes"))
    for known in ({}, {0: exact}):
        with pytest.raises(errors.EngineError, match="roles must alternate"):
            Splicer(tokenizer).prompt([answer("yes")], known)
    (tmp_path / "chat_template.jinja").unlink()
    bare = Tokenizer(tmp_path)
    with pytest.raises(errors.ChatTemplateMissing):
        Transcripts(bare).prompt_ids([HELLO])


def test_a_message_the_template_cannot_render_is_still_spliced(plain):
    transcripts = Transcripts(plain)
    calls = answer(None, tool_calls=[CALL])
    transcripts.remember([HELLO], calls, generated(plain, '{"name": "add"}'))
    prompt = transcripts.prompt_ids([HELLO, calls, RESULT])
    assert prompt.spliced == (1,)
    assert '{"name": "add"}<|im_end|>' in plain.decode(prompt.ids.tolist(), skip_special=False)


# -- marks -------------------------------------------------------------------------------------------------------------


def test_a_mark_is_a_prefix_of_every_conversation_that_is_the_same_up_to_it(plain):
    transcripts = Transcripts(plain)
    system = {
        "role": "system",
        "content": [{"type": "text", "text": "You know " + "a lot of facts. " * 30}, {"text": "Be brief."}],
    }
    done = generated(plain, "Certainly not.")
    transcripts.remember([system, HELLO], answer("Certainly not."), done)
    messages = [system, HELLO, answer("Certainly not."), MORE]
    marks = [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]
    prompt = transcripts.prompt_ids(messages, marks=marks)
    assert list(prompt.marks) == sorted(prompt.marks)
    assert prompt.marks[0] > 100
    assert prompt.ids[prompt.marks[3] - 1] == END
    endings = ["", "s", " s", "\n", "!", "1", "雪", ".", "</think>"]
    for (index, part), offset in zip(marks, prompt.marks, strict=True):
        for ending in endings:
            content = messages[index]["content"]
            parts = [one["text"] for one in content[: part + 1]] if isinstance(content, list) else [content]
            changed = {"role": messages[index]["role"], "content": "".join(parts) + ending}
            if index == 2:
                changed = messages[2]
            other = transcripts.prompt_ids([*messages[:index], changed, {"role": "user", "content": ending}])
            assert other.ids.tolist()[:offset] == prompt.ids.tolist()[:offset]


def test_a_mark_lies_before_thinking_that_the_next_question_drops(templated):
    tokenizer = templated(HYBRID)
    transcripts = Transcripts(tokenizer)
    calls = answer(None, tool_calls=[CALL])
    first = transcripts.prompt_ids([HELLO])
    transcripts.remember([HELLO], calls, generated(tokenizer, "<think>\nAdd.\n</think>\n\nadd(1, 2)"))
    prompt = transcripts.prompt_ids([HELLO, calls, RESULT], marks=[(2, 0)])
    assert prompt.marks == (len(first.ids),)


def test_marks_where_there_is_nothing_are_told(plain):
    for mark in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        with pytest.raises(errors.ConfigError):
            Transcripts(plain).prompt_ids([HELLO], marks=[mark])


def test_a_mark_that_the_template_does_not_show_promises_nothing(templated):
    tokenizer = templated("{{ messages | length }} messages")
    assert Transcripts(tokenizer).prompt_ids([HELLO, answer("a"), MORE], marks=[(0, 0)]).marks == (0,)


# -- what is remembered ------------------------------------------------------------------------------------------------


def test_a_message_written_otherwise_is_the_same_message():
    same = [
        answer(None, tool_calls=[CALL], refusal=None, id="x"),
        answer("", tool_calls=[{"id": "other", "function": {"name": "add", "arguments": '{"b":2,"a":1.0}'}}]),
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]},
        answer([], tool_calls=[CALL], reasoning_content="Hm."),
        answer("<think>Hm.</think>\n", tool_calls=[CALL]),
    ]
    assert len({canonical_message(one) for one in same}) == 1
    others = [answer("", tool_calls=[]), answer("a", tool_calls=[CALL]), answer("", tool_calls=[CALL, CALL]), HELLO]
    others.append(answer("", tool_calls=[{"function": {"name": "add", "arguments": '{"a": 1'}}]))
    others.append(answer("", tool_calls=[{"function": {"name": "add", "arguments": "[" * 100_000}}]))
    assert len({canonical_message(one) for one in [same[0], *others]}) == 1 + len(others)
    assert canonical_message(HELLO) != canonical_message({**HELLO, "content": HELLO["content"] + " "})
    assert canonical_tools([CALL]) == canonical_tools([{**CALL, "function": dict(reversed(CALL["function"].items()))}])
    assert canonical_tools([CALL]) != canonical_tools([CALL, CALL]) != canonical_tools(None) == canonical_tools([])


def test_contents_without_text_are_named():
    for content in (1, {"text": "a"}, [{"type": "image_url", "image_url": {}}], [None]):
        with pytest.raises(errors.ConfigError):
            text_of(content)
    for content, part in (("a", 1), (None, 1), ([], 0), (3, 0)):
        with pytest.raises(errors.ConfigError):
            part_end(content, part)
    assert part_end([{"text": "ab"}, "c"], 1) == 3


def test_tool_calls_reach_templates_parsed():
    call = rendered_message(answer(None, tool_calls=[CALL]))["tool_calls"][0]
    assert call == {**CALL, "function": {"name": "add", "arguments": {"a": 1, "b": 2.0}}}
    assert CALL["function"]["arguments"] == '{"a": 1, "b": 2.0}'
    broken = {"function": {"name": "add", "arguments": '{"a'}}
    assert rendered_message(answer("", tool_calls=[broken, {"x": 1}]))["tool_calls"] == [broken, {"x": 1}]


def test_only_the_conversation_that_led_to_an_answer_finds_it(plain):
    transcripts = Transcripts(plain)
    transcripts.remember([HELLO], answer("Yes."), generated(plain, "Yes."), namespace="a", tools=[CALL])
    asked = [HELLO, answer("Yes."), MORE]
    assert transcripts.prompt_ids(asked, namespace="a", tools=[CALL]).spliced == (1,)
    for messages, tools, namespace in (
        (asked, [CALL], "b"),
        (asked, None, "a"),
        ([MORE, *asked[1:]], [CALL], "a"),
        ([SYSTEM, *asked], [CALL], "a"),
        ([HELLO, answer("No."), MORE], [CALL], "a"),
    ):
        assert transcripts.prompt_ids(messages, tools=tools, namespace=namespace).spliced == ()
    stats = transcripts.stats()
    assert (stats.num_answers, stats.found, stats.unknown) == (1, 1, 5)
    assert (transcripts.forget("b"), transcripts.forget("a"), transcripts.stats().num_tokens) == (0, 1, 0)
    with pytest.raises(errors.ConfigError):
        transcripts.remember([HELLO], MORE, generated(plain, "Yes."))


def test_the_answers_used_longest_ago_are_forgotten_first(plain):
    done = generated(plain, "Yes.")
    one = len(done.token_ids) + 32
    transcripts = Transcripts(plain, max_tokens=3 * one)
    asked = [[{"role": "user", "content": str(n)}, answer("Yes.")] for n in range(4)]
    for messages in asked[:3] + asked[:1]:  # the first once more, which counts it once and makes it the newest
        transcripts.remember(messages[:1], messages[1], done)
    assert transcripts.stats().num_tokens == 3 * one
    assert transcripts.known(asked[1])
    transcripts.remember(asked[3][:1], asked[3][1], done)
    assert [len(transcripts.known(messages)) for messages in asked] == [1, 1, 0, 1]
    assert transcripts.stats().num_tokens == 3 * one
    nothing = Transcripts(plain, max_tokens=0)
    nothing.remember(asked[0][:1], asked[0][1], done)
    assert nothing.stats().num_answers == nothing.stats().num_tokens == 0


def test_threads_may_remember_and_ask_at_once(plain):
    transcripts, failed = Transcripts(plain, max_tokens=400), []
    done = generated(plain, "Yes.")

    def work(name):
        for n in range(30):
            messages = [{"role": "user", "content": f"{name} {n}"}]
            transcripts.remember(messages, answer("Yes."), done, namespace=name)
            prompt = transcripts.prompt_ids([*messages, answer("Yes."), MORE], namespace=name)
            if plain.decode(prompt.ids.tolist(), False) != plain.chat_text([*messages, answer("Yes."), MORE]):
                failed.append((name, n))

    threads = [Thread(target=work, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert transcripts.stats().num_tokens <= 400


def test_pieces_forgotten_are_tokenised_again(plain):
    small, large = Splicer(plain, max_cached_tokens=0), Splicer(plain)
    for _ in range(2):
        assert small.prompt([SYSTEM, HELLO]) == large.prompt([SYSTEM, HELLO])


@given(st.text("ab雪", max_size=200), st.text("ab🙂", max_size=9), st.text("ab", max_size=9))
def test_common_characters_are_counted_as_characters(head, left, right):
    common = common_characters(head + "x" + left, head + "y" + right)
    assert common == len(head)
