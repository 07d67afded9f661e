"""An engine in pages means what an engine in views means: a step may run ahead there, and nobody can tell."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from radixkv import errors
from radixkv.engine import Engine, RequestOptions, SamplingParams
from radixkv.engine.structure import Structure
from radixkv_kernels import backend

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)
PAGE = 8


@pytest.fixture(autouse=True)
def references(monkeypatch):
    """The plain kernels run: what is tested here is who reads and writes which page, and the interpreter is slow."""
    monkeypatch.setattr(backend, "_INTERPRETED", False)


@pytest.fixture(params=["pages", "views"])
def attention(request):
    return request.param


def params(count: int = 10, **settings: object) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, **settings)


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(10, 256, count).tolist()


@contextmanager
def tiny(attention: str, **settings: object):
    """An engine that must have given everything back in the end, and have counted every token."""
    settings = {"dtype": "float32", "num_pages": 128, "page_size": PAGE, "device": "cpu"} | settings
    with Engine.random(CONFIG, seed=1, attention=attention, **settings) as engine:
        engine.store.kv.fill_(float("nan"))  # what nobody wrote must not matter
        yield engine
        settled(engine)


def settled(engine):
    """Nothing runs, so nothing is held: no lease, no page of a request's own, no step under way."""
    stats = engine.cache.stats()
    assert (stats.num_leases, stats.num_leased, engine.busy) == (0, 0, False)
    assert engine._batcher._flight is None
    engine.cache.check()
    totals = engine.stats()
    assert totals.cached_tokens + totals.computed_tokens == totals.prompt_tokens


def submit(engine, prompt, sampling=None, **options):
    request = engine._request(prompt, sampling or params(), RequestOptions(**options))
    engine._submit([request])
    return request


def drive(engine, requests, max_steps: int = 2000):
    for _ in range(max_steps):
        if all(request.finished for request in requests):
            return [tuple(request.output) for request in requests]
        engine.step()
    raise AssertionError("somebody does not get on")


def alone(prompts, sampling=None):
    """What each prompt is answered by an engine in views that has nothing cached, and nobody else."""
    with tiny("views") as engine:
        samplings = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        return [
            engine.generate([prompt], one or params(), cache=False)[0].token_ids
            for prompt, one in zip(prompts, samplings, strict=True)
        ]


# -- hits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [1, 7, 8, 16, 19, 47, 48, 50])
def test_a_hit_on_a_page_or_inside_one_answers_as_a_miss(attention, shared):
    first = ids(50, 1)
    prompt = [*first[:shared], 3, *ids(9, 2)]  # 3 is in no prompt: they part exactly there
    with tiny(attention) as engine:
        engine.generate([first], params(0))
        done = engine.generate([prompt], params())[0]
        again = engine.generate([prompt], params())[0]
        assert done.cached_tokens == min(shared, 48), "whole pages were published, and the head of any is taken"
        assert again.cached_tokens == len(prompt) - 1
        assert [done.token_ids] == [again.token_ids] == alone([prompt])


def test_a_longer_question_finds_the_answer_before_it(attention):
    prompt = ids(21, 1)
    with tiny(attention) as engine:
        first = engine.generate([prompt], params(20))[0]
        longer = [*prompt, *first.token_ids, *ids(6, 2)]
        done = engine.generate([longer], params())[0]
        assert done.cached_tokens == 40, "of 41 tokens, the last of which has no KV yet"
        assert [done.token_ids] == alone([longer])


def test_forks_of_one_running_request_do_not_disturb_it_nor_each_other(attention):
    trunk = ids(30, 1)
    prompts = [trunk + ids(20, 2)] + [trunk[:cut] + ids(6, cut) for cut in (5, 11, 16, 24, 29)]
    expected = alone(prompts, params(24))
    with tiny(attention) as engine:
        requests = [submit(engine, prompts[0], params(24))]
        for prompt in prompts[1:]:
            for _ in range(3):
                engine.step()
            requests.append(submit(engine, prompt, params(24)))
        assert drive(engine, requests) == expected
        assert [request.cached for request in requests] == [0, 5, 11, 16, 24, 29]


def test_what_was_evicted_is_computed_again_and_answers_the_same(attention):
    prompts = [ids(60, seed) for seed in range(6)]
    expected = alone(prompts)
    with tiny(attention, num_pages=24) as engine:
        for number in (0, 1, 2, 0, 3, 4, 4, 5, 0):
            done = engine.generate([prompts[number]], params())[0]
            assert done.token_ids == expected[number]
            engine.cache.check()
        assert 0 < engine.stats().cached_tokens < 4 * 56, "some of four repetitions was there, and not all"


def test_copies_of_one_prompt_are_computed_once(attention):
    prompt = ids(44, 1)
    with tiny(attention) as engine:
        done = engine.generate([prompt] * 5, params())
        assert {one.token_ids for one in done} == set(alone([prompt]))
        assert engine.stats().computed_tokens == 44 + 4 * 4, "the last page, which is not full, each for itself"


def test_a_follower_attaches_and_goes_on_alone_where_its_leader_ends(attention):
    shared = ids(160, 1)
    prompts = [shared + [11] * 30, shared + [12] * 30]
    expected = alone(prompts)
    with tiny(attention, prefill_chunk=32) as engine:
        first, second = (submit(engine, prompt) for prompt in prompts)
        engine.step()
        engine.step()
        assert second.position == first.position == 64
        assert drive(engine, [first, second]) == expected
        assert (first.computed, second.computed, second.cached) == (190, 30, 160)
        engine.cache.flush()
        first, second = (submit(engine, prompt) for prompt in prompts)
        engine.step()
        engine.step()
        engine._cancel([first])
        assert drive(engine, [second]) == expected[1:]
        assert first.computed + second.computed == 190


# -- making room ------------------------------------------------------------------------------------------------------


def test_making_room_changes_no_answer_and_no_count(attention):
    prompts = [ids(24, seed) for seed in range(4)]
    expected = alone(prompts, params(100))  # more than the pages that an admission leaves for an answer
    with tiny(attention, num_pages=30, max_running=4) as engine:
        requests = [submit(engine, prompt, params(100)) for prompt in prompts]
        assert drive(engine, requests) == expected
        stats = engine.stats()
        assert stats.preemptions > 0 and stats.recomputed_tokens > 0
        assert stats.cached_tokens == 0, "what a request finds again of its own is no hit"


def test_a_high_priority_makes_room_between_two_tokens(attention):
    prompts = [ids(50, 1), ids(30, 2)]
    expected = alone(prompts, params(20))
    with tiny(attention, max_running=1) as engine:
        low = submit(engine, prompts[0], params(20))
        for _ in range(8):
            engine.step()
        high = submit(engine, prompts[1], params(20), priority=5)
        drive(engine, [high])
        assert not low.finished and engine.stats().preemptions == 1
        assert drive(engine, [low, high]) == expected


def test_a_pool_held_by_others_fails_the_request_and_no_other(attention):
    with tiny(attention, num_pages=8) as engine:
        with engine.cache.acquire(ids(48, 5)) as lease:
            lease.extend()
            good = submit(engine, ids(9, 1), params(6))
            engine.step()
            bad = submit(engine, ids(20, 2), params(2))
            drive(engine, [good, bad])
            assert isinstance(bad.error, errors.PoolExhausted)
            assert [tuple(good.output)] == alone([ids(9, 1)], params(6))
        assert len(engine.generate([ids(20, 2)], params(2))[0].token_ids) == 2


# -- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3, 6])
def test_a_request_that_is_cancelled_in_mid_flight_leaves_the_others_as_they_were(attention, at):
    prompts = [ids(20, 1), ids(20, 1)[:13] + ids(14, 2), ids(9, 3)]
    expected = alone(prompts)
    with tiny(attention, prefill_chunk=32) as engine:
        requests = [submit(engine, prompt) for prompt in prompts]
        for _ in range(at):
            engine.step()
        engine._cancel([requests[1]])
        late = submit(engine, ids(40, 4))  # takes the pages that were just given back
        outputs = drive(engine, [*requests, late])
        assert requests[1].completion.finish_reason == "cancelled"
        assert outputs[1] == expected[1][: len(outputs[1])]
        assert [outputs[0], outputs[2]] == [expected[0], expected[2]]
        assert [outputs[3]] == alone([ids(40, 4)])


def test_a_stream_that_is_closed_gives_everything_back(attention):
    with tiny(attention) as engine:
        stream = engine.stream(ids(30), params(50))
        next(stream)
        next(stream)
        assert engine.cache.stats().num_leases == 1
        stream.close()
        settled(engine)


def test_nothing_is_under_way_once_the_last_answer_has_stopped(attention):
    free = alone([ids(22, 1)], params(12))[0]
    with tiny(attention) as engine:
        engine.generate([ids(22, 1)], params(12, stop_token_ids={free[4]}))
        settled(engine)
        engine._cancel([submit(engine, ids(40, 2))])
        request = submit(engine, ids(40, 3))
        engine.step()
        engine._cancel([request])
        settled(engine)


@pytest.mark.parametrize("number", [0, 3, 7])
def test_a_stop_token_ends_the_answer_and_what_was_computed_beyond_it_is_nobodys(attention, number):
    prompt, other = ids(22, 1), ids(11, 2)
    free, beside = alone([prompt, other], params(24))
    stop = free[number]
    length = free.index(stop) + 1
    with tiny(attention) as engine:
        running = submit(engine, other, params(24))
        engine.step()
        request = submit(engine, prompt, params(24, stop_token_ids={stop}))
        outputs = drive(engine, [request, running])
        assert outputs == [free[:length], beside]
        assert request.completion.finish_reason == "stop"
        assert [chunk.token_id for chunk in request.chunks if chunk.token_id is not None] == list(free[:length])
        longer = [*prompt, *free[:length], 3, 4, 5]
        done = engine.generate([longer], params(6))[0]
        assert done.cached_tokens == (22 + length - 1) // PAGE * PAGE
        assert [done.token_ids] == alone([longer], params(6))


def test_an_answer_ends_where_it_may_and_where_the_context_ends(attention):
    with tiny(attention, max_context=40) as engine:
        for count in (0, 1, 2):
            done = engine.generate([ids(20, count)], params(count))[0]
            assert (len(done.token_ids), done.finish_reason) == (count, "length")
        assert engine.cache.match(ids(20, 0)) == 16
        assert len(engine.generate([ids(33)], params(100))[0].token_ids) == 7


def test_a_deadline_ends_a_request_and_no_other(attention):
    with tiny(attention) as engine:
        good = submit(engine, ids(20, 1))
        engine.step()
        late = submit(engine, ids(20, 2), params(400), deadline_s=1e-9)
        assert drive(engine, [good, late])[:1] == alone([ids(20, 1)])
        assert isinstance(late.error, errors.DeadlineExceeded)


class Failing:
    """Stands before a runner, and fails for steps with a work of so many tokens."""

    def __init__(self, runner, num_tokens):
        self.runner, self.num_tokens = runner, num_tokens

    def forward(self, works, *rest):
        if any(len(work.tokens) == self.num_tokens for work in works):
            raise RuntimeError("device on fire")
        return self.runner.forward(works, *rest)

    def __getattr__(self, name):
        return getattr(self.runner, name)


def test_a_step_that_fails_ends_only_whom_it_fails_for_alone(attention):
    prompts = [ids(20, 1), ids(12, 2)]
    with tiny(attention) as engine:
        engine.runner = Failing(engine.runner, 29)
        good = [submit(engine, prompt) for prompt in prompts]
        for _ in range(3):
            engine.step()
        bad = submit(engine, ids(29, 3))
        assert drive(engine, [*good, bad])[:2] == alone(prompts)
        assert "on fire" in str(bad.error)
        engine.runner = engine.runner.runner
        assert [engine.generate([ids(29, 3)], params())[0].token_ids] == alone([ids(29, 3)])


# -- without the cache, and exactly -----------------------------------------------------------------------------------


def test_without_the_cache_nothing_is_found_or_kept(attention):
    prompt = ids(40, 1)
    with tiny(attention) as engine:
        engine.generate([prompt], params(2))
        before = engine.cache.stats()
        done = engine.generate([prompt, ids(30, 2)], params(), cache=False)
        after = engine.cache.stats()
        assert [one.cached_tokens for one in done] == [0, 0]
        assert [one.token_ids for one in done] == alone([prompt, ids(30, 2)])
        assert (after.num_free, after.num_evictable) == (before.num_free, before.num_evictable)
        assert engine.cache.match(ids(30, 2)) == 0 and engine.cache.match(prompt) == 40


@pytest.mark.parametrize("shared", [32, 45, 60])
def test_in_exact_mode_a_hit_is_bit_for_bit_a_miss(attention, shared, record):
    prompts = [ids(60, 1), ids(60, 1)[:shared] + ids(20, 2)]
    settings = {"exact": True, "exact_block": 16, "prefill_chunk": 32, "mixed_tokens": 24}
    rows = []
    for warm in (False, True):
        with tiny(attention, **settings) as engine:
            if warm:
                engine.generate(prompts[:1], params(4))
            with record(engine) as logits:
                done = engine.generate(prompts[1:], params(8))[0]
            assert done.cached_tokens == (min(shared, 59) // 16 * 16 if warm else 0)
            rows.append(logits[-8:])
    assert all(torch.equal(one, other) for one, other in zip(*rows, strict=True))


# -- everything at once -----------------------------------------------------------------------------------------------


def mixture(seed: int):
    """Twelve prompts, of which many begin alike, and how each wants its tokens chosen."""
    rng = np.random.default_rng(seed)
    trunks = [ids(length, 900 + length) for length in (20, 61, 100)]
    kinds = [
        {},
        {"temperature": 0.9, "top_p": 0.9},
        {"repetition_penalty": 1.3},
        {"logprobs": 2},
        {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1},
        {"logit_bias": {5: 3.0}},
    ]
    prompts, samplings = [], []
    for number in range(12):
        trunk = trunks[number % 4][: rng.integers(3, 100)] if number % 4 < 3 else []
        prompts.append(trunk + ids(int(rng.integers(1, 50)), seed * 1000 + number))
        samplings.append(params(int(rng.integers(1, 24)), seed=number, **kinds[number % len(kinds)]))
    return prompts, samplings, rng


@pytest.mark.parametrize("seed", range(4))
def test_a_mixture_is_answered_as_each_alone_wherever_the_kv_is(attention, seed):
    prompts, samplings, rng = mixture(seed)
    expected = alone(prompts, samplings)
    with tiny(attention, num_pages=40, prefill_chunk=48, mixed_tokens=20, max_running=5) as engine:
        requests, dropped = [], []
        for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            options = (
                {"cache": False} if number % 5 == 4 else {"priority": int(rng.integers(0, 3)), "tenant": "ab"[number % 2]}
            )
            requests.append(submit(engine, prompt, sampling, **options))
            for _ in range(int(rng.integers(0, 5))):
                engine.step()
            if number % 4 == 3:  # somebody comes, and goes before the end
                dropped.append(submit(engine, prompt[:20] + ids(20, number), params(50)))
                engine.step()
                engine._cancel(dropped[-2:-1])
        engine._cancel(dropped)
        assert drive(engine, requests) == expected
        for request in requests:
            done = request.completion
            assert done.cached_tokens + done.computed_tokens == done.prompt_tokens
            assert done.logprobs is None or len(done.logprobs) == len(done.token_ids)
        assert engine.stats().cached_tokens > 0


def test_two_engines_chose_the_same_tokens_with_the_same_log_probabilities():
    prompts, _, rng = mixture(9)
    given = []
    waits = rng.integers(0, 5, len(prompts)).tolist()
    for attention in ("pages", "views"):
        with tiny(attention, num_pages=48, prefill_chunk=64, mixed_tokens=24, max_running=6) as engine:
            requests = []
            for prompt, wait in zip(prompts, waits, strict=True):
                requests.append(submit(engine, prompt, params(16, logprobs=3)))
                for _ in range(wait):
                    engine.step()
            given.append((drive(engine, requests), [request.completion.logprobs for request in requests]))
    (tokens, logprobs), (others, other_logprobs) = given
    assert tokens == others
    for one, other in zip(logprobs, other_logprobs, strict=True):
        assert [row.token_id for row in one] == [row.token_id for row in other]
        np.testing.assert_allclose([row.logprob for row in one], [row.logprob for row in other], atol=1e-4)


@pytest.mark.model
def test_the_real_model_keeps_a_form_and_an_interrupted_conversation_wherever_its_kv_is(smollm2):
    form = SamplingParams(max_tokens=12, structure=Structure.regex(r"[0-9]{3}-[0-9]{2}"))
    given = []
    for attention in ("pages", "views"):
        settings = {"dtype": "float32", "num_pages": 64, "max_context": 280, "device": "cpu", "attention": attention}
        with Engine("smollm2", max_running=1, **settings) as engine:
            chat = engine.chat()
            for turn in ("Count to three.", "And on."):
                for number, _ in enumerate(chat.stream(turn, params(6))):
                    if number == 3:
                        urgent = submit(engine, engine.tokenizer.encode("My number is"), form, priority=5)
            assert engine.stats().preemptions == 2 and urgent.completion.finish_reason == "stop"
            given.append((chat.tokens.tolist(), urgent.completion.text))
            settled(engine)
    assert given[0] == given[1]
