"""Requests that run together answer as they do alone, whoever comes, waits, follows or makes room."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
from transformers import LlamaConfig

from radixkv import errors
from radixkv.engine import Engine, RequestOptions, SamplingParams
from radixkv.engine.request import Request

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
)
PAGE = 8


def params(count: int = 12, **settings: object) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, **settings)


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(10, 256, count).tolist()


@contextmanager
def tiny(**settings: object):
    settings = {"dtype": "float32", "num_pages": 256, "page_size": PAGE} | settings
    with Engine.random(CONFIG, seed=1, **settings) as engine:
        yield engine
        stats = engine.cache.stats()
        assert (stats.num_leases, stats.num_leased, engine.busy) == (0, 0, False)
        engine.cache.check()


def submit(engine, prompt, sampling=None, **options):
    request = engine._request(prompt, sampling or params(), RequestOptions(**options))
    engine._submit([request])
    return request


def drive(engine, requests, max_steps: int = 3000):
    for _ in range(max_steps):
        if all(request.finished for request in requests):
            return [tuple(request.output) for request in requests]
        engine.step()
    raise AssertionError("somebody does not get on")


def alone(prompts, sampling=None, **settings):
    """What each prompt is answered when nobody else is there, and nothing is cached."""
    with tiny(**settings) as engine:
        samplings = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        return [
            engine.generate([prompt], one or params(), cache=settings.get("exact") or False)[0].token_ids
            for prompt, one in zip(prompts, samplings, strict=True)
        ]


def whole(request) -> bool:
    done = request.completion
    return done is not None and done.cached_tokens + done.computed_tokens == done.prompt_tokens == len(request.prompt)


def mixture(count: int, seed: int) -> list[list[int]]:
    """Prompts of which many begin alike."""
    rng = np.random.default_rng(seed)
    shared = [ids(length, 900 + length) for length in (40, 120, 200)]
    made = []
    for number in range(count):
        begin = shared[number % 4][: rng.integers(8, 200)] if number % 4 < 3 else []
        made.append(begin + ids(int(rng.integers(1, 90)), seed * 1000 + number))
    return made


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_answers_do_not_depend_on_who_else_runs(seed):
    prompts = mixture(14, seed)
    rng = np.random.default_rng(seed)
    expected = alone(prompts)
    with tiny(prefill_chunk=64, mixed_tokens=24, max_running=5) as engine:
        requests = []
        for number, prompt in enumerate(prompts):
            options = (
                {"cache": False} if number % 5 == 4 else {"priority": int(rng.integers(0, 3)), "tenant": "ab"[number % 2]}
            )
            requests.append(submit(engine, prompt, **options))
            for _ in range(int(rng.integers(0, 6))):
                engine.step()
        assert drive(engine, requests) == expected
        assert all(map(whole, requests))
        assert all(not request.completion.cached_tokens for request in requests[4::5])
        stats = engine.stats()
        assert stats.cached_tokens + stats.computed_tokens == stats.prompt_tokens == sum(map(len, prompts))
        assert stats.cached_tokens > 0


def test_the_real_model_answers_in_a_mixture_as_alone(fp32_engine):
    tokenizer = fp32_engine.tokenizer
    texts = ["The capital of France is", "def fibonacci(n):", "Water boils at", "The capital of Spain is Madrid. " * 12]
    prompts = [tokenizer.encode(text) for text in texts]
    expected = [fp32_engine.generate([prompt], params(6), cache=False)[0].token_ids for prompt in prompts]
    requests = []
    for number, prompt in enumerate(prompts):
        requests.append(submit(fp32_engine, prompt, params(6), namespace=f"mix{number % 2}"))
        fp32_engine.step()
    assert drive(fp32_engine, requests) == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_making_room_changes_no_answer_and_no_count(seed):
    prompts = [ids(40, seed * 10 + number) for number in range(4)]
    sampling = params(120)  # more than the pages that an admission leaves for an answer
    expected = alone(prompts, sampling)
    with tiny(num_pages=36, max_running=4) as engine:
        requests = [submit(engine, prompt, sampling) for prompt in prompts]
        assert drive(engine, requests) == expected
        stats = engine.stats()
        assert stats.preemptions > 0 and stats.recomputed_tokens > 0
        assert all(map(whole, requests))
        assert stats.cached_tokens == 0, "what a request finds again of its own is no hit"
        assert all(len(request.completion.token_ids) == 120 for request in requests)


def test_a_high_priority_makes_room_and_changes_no_answer():
    prompts = [ids(100, 1), ids(50, 2)]
    expected = alone(prompts, params(30))
    with tiny(max_running=1) as engine:
        low = submit(engine, prompts[0], params(30))
        for _ in range(10):
            engine.step()
        high = submit(engine, prompts[1], params(30), priority=5)
        drive(engine, [high])
        assert not low.finished and engine.stats().preemptions == 1
        assert [low.output, high.output] != expected
        assert drive(engine, [low, high]) == expected


@pytest.mark.parametrize("chunk", [32, 2048])
def test_exact_answers_are_bit_equal_under_preemption_and_beside_others(chunk, record):
    prompts = [ids(70, 1), ids(70, 1)[:40] + ids(37, 2), ids(90, 3), ids(64, 4)]
    sampling = params(110)
    settings = {"exact": True, "exact_block": 16, "prefill_chunk": chunk, "mixed_tokens": 20}
    truth = []
    for prompt in prompts:
        with tiny(**settings) as engine, record(engine) as logits:
            engine.generate([prompt], sampling)
            truth.append(list(logits))
    with tiny(num_pages=40, max_running=4, **settings) as engine:
        rows, requests = {}, []
        sampler = Request.sampler
        for prompt in prompts:
            requests.append(submit(engine, prompt, sampling))
            engine.step()
        for request in requests:
            rows[request] = []
            request.sampler = lambda all_rows, it=request: rows[it].append(all_rows[0].clone()) or sampler(it, all_rows)
        drive(engine, requests)
        assert engine.stats().preemptions > 0
        for request, expected in zip(requests, truth, strict=True):
            assert len(expected) == 110
            seen = rows[request]
            assert all(bool((one == other).all()) for one, other in zip(seen, expected[-len(seen) :], strict=True))


def test_exact_blocks_stay_whole_where_the_queue_is_longer_than_what_is_looked_up():
    settings = {"exact": True, "exact_block": 32, "num_pages": 40, "max_running": 2, "prefill_chunk": 64}
    hot = ids(64, 7)
    expected = alone([hot + ids(10, 8)], params(4), **settings)
    with tiny(**settings) as engine:
        engine.generate([hot + ids(1, 9)], params(1))
        request = engine._request(hot + ids(10, 8), params(4), None)
        engine._executor.probe(request)
        assert request.job.num_cached == 64
        engine.cache.flush()  # and what was seen is not there any more when it starts
        probe, engine._executor.probe = engine._executor.probe, lambda request: None
        engine._submit([request])
        engine.step()
        engine._executor.probe = probe
        assert drive(engine, [request]) == expected
        again = submit(engine, hot + ids(10, 8), params(4))
        assert drive(engine, [again]) == expected
        assert again.cached == 64


def test_a_sampled_answer_with_a_seed_is_the_same_in_any_company():
    prompts = mixture(8, 5)
    samplings = [params(16, temperature=0.8, top_p=0.9, seed=number) for number in range(8)]
    expected = alone(prompts, samplings)
    with tiny(num_pages=60, max_running=8, prefill_chunk=64) as engine:
        requests = [submit(engine, prompt, one) for prompt, one in zip(prompts, samplings, strict=True)]
        assert drive(engine, requests) == expected


# -- attaching --------------------------------------------------------------------------------------------------------


def test_two_requests_of_one_long_prefix_compute_it_once_page_by_page():
    shared = ids(400, 1)
    prompts = [shared + [11] * 30, shared + [12] * 30]
    expected = alone(prompts)
    with tiny(prefill_chunk=64) as engine:
        first, second = (submit(engine, prompt) for prompt in prompts)
        gaps = []
        while first.position < 400:
            engine.step()
            gaps.append(first.position // PAGE - second.position // PAGE)
        assert gaps[:5] == [0] * 5, "the follower is never behind"
        assert list(first.lease.pages[:50]) == list(second.lease.pages[:50])
        assert drive(engine, [first, second]) == expected
        assert first.computed + second.computed == 400 + 30 + 30
        assert (first.cached, second.cached) == (0, 400)


def test_a_follower_leaves_its_leader_where_their_ways_part():
    shared = ids(160, 1)
    with tiny(prefill_chunk=64) as engine:
        leader = submit(engine, shared + [11] * 800, params(2))
        follower = submit(engine, shared + [12] * 8, params(2))
        for _ in range(3):
            engine.step()
        assert leader.job.prefilling and follower.position == 160
        assert not leader.finished and follower.job.position == 160, "the scheduler knows how far it is"
        drive(engine, [leader, follower])
        assert leader.computed + follower.computed == 160 + 800 + 8


@pytest.mark.parametrize("cancelled_at", [1, 2, 4])
def test_a_follower_goes_on_where_its_leader_was_cancelled(cancelled_at):
    shared = ids(400, 1)
    prompts = [shared + [11] * 30, shared + [12] * 30]
    expected = alone(prompts[1:])
    with tiny(prefill_chunk=64) as engine:
        first, second = (submit(engine, prompt) for prompt in prompts)
        for _ in range(cancelled_at):
            engine.step()
        engine._cancel([first])
        assert first.completion.finish_reason == "cancelled" and first.computed == 64 * cancelled_at
        assert drive(engine, [second]) == expected
        assert first.computed + second.computed == 430


def test_followers_follow_in_a_chain():
    longest = ids(480, 3)
    prompts = [longest[:length] + [9] * 8 for length in (480, 320, 160, 80)]
    expected = alone(prompts)
    with tiny(prefill_chunk=64) as engine:
        requests = [submit(engine, prompt) for prompt in prompts]
        assert drive(engine, requests) == expected
        assert sum(request.computed for request in requests) == 480 + 4 * 8


def test_copies_of_one_prompt_are_computed_once():
    prompt = ids(100, 1)
    expected = alone([prompt])
    with tiny() as engine:
        done = engine.generate([prompt] * 8, params())
        assert {one.token_ids for one in done} == set(expected)
        assert engine.stats().computed_tokens == 100 + 7 * 4, "the last page, which is not full, each for itself"


def test_nobody_follows_across_namespaces_or_without_the_cache():
    prompt = ids(96, 1)
    with tiny(prefill_chunk=32) as engine:
        options = [{"namespace": "a"}, {"namespace": "b"}, {"cache": False}]
        requests = [submit(engine, prompt, **one) for one in options]
        outputs = drive(engine, requests)
        assert len(set(outputs)) == 1 and all(request.computed == 96 for request in requests)


# -- quotas and sessions ----------------------------------------------------------------------------------------------


def test_a_namespace_at_its_quota_waits_for_its_own_and_holds_up_nobody_else():
    with tiny(max_running=8) as engine:
        engine.cache.set_quota("small", max_pages=14)
        mine = [submit(engine, ids(80, seed), params(20), namespace="small") for seed in range(4)]
        others = [submit(engine, ids(80, 10 + seed), params(5)) for seed in range(4)]
        for _ in range(3):
            engine.step()
        assert sum(request.lease is not None for request in mine) == 1
        assert sum(request.lease is not None for request in others) == 4
        held = []
        while not all(request.finished for request in (*mine, *others)):
            engine.step()
            usage = engine.cache.usage("small")
            held.append(usage.num_pages + usage.num_leased)
        assert max(held) <= 14
        assert all(len(request.output) == 20 for request in mine)
        assert max(r.completion.total_s for r in others) < max(r.completion.total_s for r in mine)


def test_one_that_never_fits_its_quota_fails_alone():
    with tiny() as engine:
        engine.cache.set_quota("small", max_pages=5)
        bad = submit(engine, ids(80, 1), namespace="small")
        good = [submit(engine, ids(20, 2), namespace="small", tenant="t"), submit(engine, ids(80, 3))]
        drive(engine, [bad, *good])
        assert isinstance(bad.error, errors.QuotaExceeded)
        assert [len(request.output) for request in good] == [12, 12]


def test_requests_without_the_cache_neither_take_pages_nor_wait_for_them():
    with tiny(num_pages=20, max_running=4) as engine:
        big = submit(engine, ids(100, 1), params(40))
        engine.step()
        free = [submit(engine, ids(100, 2 + seed), params(4), cache=False) for seed in range(3)]
        drive(engine, free)
        assert not big.finished
        drive(engine, [big])
        assert engine.stats().preemptions == 0


def test_a_conversation_that_was_preempted_keeps_its_exact_history(smollm2):
    with Engine("smollm2", dtype="float32", num_pages=64, max_running=1, max_context=280) as engine:
        histories = []
        for interrupted in (False, True):
            chat = engine.chat(namespace=str(interrupted))
            for turn in ("Count to three.", "And on."):
                for number, _ in enumerate(chat.stream(turn, params(8))):
                    if interrupted and number == 3:
                        urgent = submit(engine, [5, 6, 7], params(2), priority=5)
            assert chat.num_turns == 2
            histories.append(chat.tokens.tolist())
        assert engine.stats().preemptions == 2 and urgent.finished
        assert histories[0] == histories[1]
        assert engine.stats().cache.num_leases == 0
        engine.cache.check()
