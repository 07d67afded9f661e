"""Chats on the real model: exact ids, reuse, fork, rewind."""

from __future__ import annotations

import pytest

from radixkv import errors
from radixkv.engine import SamplingParams
from radixkv.engine.options import WILL_CONTINUE

pytestmark = pytest.mark.model
SHORT = SamplingParams(max_tokens=12)


@pytest.fixture
def engine(fp32_engine):
    fp32_engine.cache.flush()
    yield fp32_engine
    assert fp32_engine.cache.stats().num_leases == 0
    fp32_engine.cache.check()


def test_each_turn_reuses_the_turns_before_it(engine):
    with engine.chat("You are a helpful assistant.") as session:
        first = session.send("What is the capital of France?", SHORT)
        assert "Paris" in first.text
        kept = len(session.tokens)
        second = session.send("And of Italy?", SHORT)
        assert "Rome" in second.text
        assert second.prompt_tokens > kept
        assert second.cached_tokens >= kept - 1 - 16, "all but the unfinished last page"
        assert session.num_turns == 2


def test_the_history_is_the_very_ids_that_were_computed_and_generated(engine):
    with engine.chat("Be brief.") as session:
        first = session.send("Say hello in Chinese, with an emoji.", SHORT)
        after_first = session.tokens.tolist()
        assert tuple(after_first[-len(first.token_ids) :]) == first.token_ids
        session.send("Again.", SHORT)
        assert session.tokens.tolist()[: len(after_first)] == after_first


def test_the_prompt_is_the_one_the_template_renders(engine):
    with engine.chat("Be brief.") as session:
        session.send("One.", SHORT)
        session.send("Two.", SHORT)
        text = engine.tokenizer.decode(session.tokens.array, skip_special=False)
        assert text.rstrip("\n") == engine.tokenizer.chat_text(session.messages, add_generation_prompt=False).rstrip("\n")


def test_an_answer_cut_by_max_tokens_is_closed_by_the_next_turn(engine):
    with engine.chat("Be brief.") as session:
        cut = session.send("Count from one to fifty.", SamplingParams(max_tokens=5))
        assert cut.finish_reason == "length"
        session.send("Go on.", SHORT)
        text = engine.tokenizer.decode(session.tokens.array, skip_special=False)
        assert text.count("<|im_start|>") == text.count("<|im_end|>") + (
            text.rfind("<|im_end|>") < text.rfind("<|im_start|>")
        )


def test_a_fork_goes_its_own_way_over_shared_pages(engine):
    with engine.chat("Be brief.") as session:
        session.send("Name a colour.", SHORT)
        twin = session.fork()
        here = session.send("Name a fruit.", SHORT)
        there = twin.send("Name a fruit.", SHORT)
        assert here.token_ids == there.token_ids
        assert there.cached_tokens >= here.cached_tokens
        twin.send("Name an animal.", SHORT)
        assert (session.num_turns, twin.num_turns) == (2, 3)


def test_rewind_undoes_turns_and_hits_what_they_left(engine):
    with engine.chat("Be brief.") as session:
        session.send("Name a colour.", SHORT)
        before, messages = session.tokens, session.messages
        once = session.send("Name a fruit.", SHORT)
        session.rewind()
        assert (session.tokens, session.messages) == (before, messages)
        again = session.send("Name a fruit.", SHORT)
        assert again.token_ids == once.token_ids
        assert again.cached_tokens >= once.prompt_tokens - 16
        session.rewind(2)
        assert (session.num_turns, len(session.tokens)) == (0, 0)
        with pytest.raises(errors.ConfigError):
            session.rewind()


def test_a_stream_closed_midway_is_undone(engine):
    with engine.chat("Be brief.") as session:
        session.send("Name a colour.", SHORT)
        before = session.tokens
        stream = session.stream("Count to a hundred.", SamplingParams(max_tokens=64))
        for _ in range(5):
            next(stream)
        stream.close()
        assert (session.tokens, session.num_turns) == (before, 1)
        assert session.send("Name a fruit.", SHORT).cached_tokens > 0


def test_streamed_text_is_the_answers_text(engine):
    with engine.chat() as session:
        chunks = list(session.stream("Write a haiku about snow ☃ and 雪.", SamplingParams(max_tokens=40)))
        assert "".join(chunk.text for chunk in chunks) == chunks[-1].completion.text


def test_stop_strings_end_the_answer_and_are_not_shown(engine):
    with engine.chat("You are a helpful assistant.") as session:
        done = session.send("What is the capital of France?", SamplingParams(max_tokens=32, stop=("Paris",)))
        assert done.finish_reason == "stop"
        assert "Paris" not in done.text
        assert done.text.startswith("The capital")


def test_turns_after_eviction_and_flush_answer_as_before(engine):
    answers = []
    for disturb in (lambda: None, lambda: engine.cache.evict(3), engine.cache.flush):
        with engine.chat("Be brief.") as session:
            session.send("Name a colour.", SHORT)
            disturb()
            answers.append(session.send("Name a fruit.", SHORT).token_ids)
    assert answers[0] == answers[1] == answers[2]


def test_misuse_is_named(engine):
    session = engine.chat()
    with pytest.raises(errors.PromptTooLong):
        session.send("word " * 9000)
    assert len(session.tokens) == 0
    with pytest.raises(errors.ConfigError):
        session.rewind(1)
    session.close()
    for act in (lambda: session.send("x"), session.fork, session.rewind):
        with pytest.raises(errors.SessionClosed):
            act()


def test_with_the_cache_off_a_chat_still_keeps_its_history(engine):
    with engine.chat("Be brief.") as on, engine.chat("Be brief.", cache=False) as off:
        for text in ("Name a colour.", "Name a fruit."):
            hit, miss = on.send(text, SHORT), off.send(text, SHORT)
            assert hit.token_ids == miss.token_ids
            assert miss.cached_tokens == 0


def test_one_turn_at_a_time(engine):
    with engine.chat("Be brief.") as session:
        session.send("Name a colour.", SHORT)
        before = session.tokens
        first, second = session.stream("Name a fruit.", SHORT), session.stream("Name a bird.", SHORT)
        next(first)
        for act in (lambda: next(second), session.fork, session.rewind, lambda: session.stream("x")):
            with pytest.raises(errors.SessionBusy):
                act()
        first.close()
        assert (session.tokens, session.num_turns) == (before, 1)
        stale = session.stream("Name a bird.", SHORT)
        session.send("Name a fruit.", SHORT)
        with pytest.raises(errors.SessionBusy):
            next(stale)
        assert session.num_turns == 2


def test_a_stream_that_is_never_read_leaves_the_session_as_it_was(engine):
    with engine.chat("Be brief.") as session:
        session.stream("Name a colour.", SHORT).close()
        session.stream("Name a fruit.", SHORT)
        assert len(session.tokens) == 0
        assert session.send("Name a bird.", SHORT).text


def test_a_session_says_that_it_will_continue_and_a_lone_prompt_does_not(fp32_engine, monkeypatch):
    tags, real = [], fp32_engine.cache.acquire

    def acquire(*args, tag=0, **more):
        tags.append(tag)
        return real(*args, tag=tag, **more)

    monkeypatch.setattr(fp32_engine.cache, "acquire", acquire)
    fp32_engine.generate("Hello", SamplingParams(max_tokens=1))
    with fp32_engine.chat() as session:
        session.send("Hello", SamplingParams(max_tokens=1))
    assert tags == [0, WILL_CONTINUE]
