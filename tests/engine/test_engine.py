"""The engine as its users meet it: answers, streams, limits, failures."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from radixkv import errors
from radixkv.engine import Engine, EngineConfig, SamplingParams

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    eos_token_id=7,
)


@pytest.fixture
def engine():
    with Engine.random(CONFIG, seed=1, dtype="float32", num_pages=64, page_size=8) as engine:
        yield engine
        assert engine.cache.stats().num_leases == 0, "a test left a lease behind"
        engine.cache.check()
        stats = engine.stats()
        assert stats.cached_tokens + stats.computed_tokens == stats.prompt_tokens


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(10, 256, count).tolist()


def test_cached_and_computed_tokens_sum_to_the_prompt(engine):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    first, second = engine.generate([ids(50)], params)[0], engine.generate([ids(50)], params)[0]
    assert (first.prompt_tokens, first.cached_tokens, first.computed_tokens) == (50, 0, 50)
    assert (second.prompt_tokens, second.cached_tokens, second.computed_tokens) == (50, 49, 1)
    assert first.token_ids == second.token_ids
    assert second.ttft_s > 0


def test_one_token_is_always_computed(engine):
    for _ in range(2):
        done = engine.generate([[11]], SamplingParams(max_tokens=1))[0]
        assert (done.cached_tokens, done.computed_tokens) == (0, 1)


def test_max_tokens_0_warms_the_cache_and_says_nothing(engine):
    done = engine.generate([ids(40)], SamplingParams(max_tokens=0))[0]
    assert (done.token_ids, done.finish_reason) == ((), "length")
    assert engine.cache.match(ids(40)) == 40


def test_with_the_cache_off_nothing_is_found_or_kept(engine):
    engine.generate([ids(40)], SamplingParams(max_tokens=2))
    done = engine.generate([ids(40)], SamplingParams(max_tokens=2), cache=False)[0]
    assert done.cached_tokens == 0
    before = engine.cache.stats()
    engine.generate([ids(40, 9)], SamplingParams(max_tokens=2), cache=False)
    assert engine.cache.stats() == before


def test_namespaces_share_nothing(engine):
    engine.generate([ids(40)], SamplingParams(max_tokens=1), namespace="a")
    assert engine.generate([ids(40)], SamplingParams(max_tokens=1), namespace="b")[0].cached_tokens == 0
    assert engine.generate([ids(40)], SamplingParams(max_tokens=1), namespace="a")[0].cached_tokens == 39


def test_a_stream_gives_the_same_tokens_as_generate(engine):
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    whole = engine.generate([ids(30)], params)[0]
    chunks = list(engine.stream(ids(30), params))
    assert tuple(chunk.token_id for chunk in chunks if chunk.token_id is not None) == whole.token_ids
    assert chunks[-1].completion.token_ids == whole.token_ids
    assert [chunk.completion for chunk in chunks[:-1]] == [None] * 9


def test_closing_a_stream_cancels_its_request_and_frees_its_pages(engine):
    stream = engine.stream(ids(30), SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    assert engine.cache.stats().num_leases == 1
    stream.close()
    stats = engine.cache.stats()
    assert (stats.num_leases, stats.num_leased) == (0, 0)
    assert stats.num_evictable > 0, "what it computed stays cached"


def test_stop_token_ids_end_the_answer(engine):
    free = engine.generate([ids(30)], SamplingParams(max_tokens=12, ignore_eos=True))[0]
    stop = free.token_ids[5]
    cut = free.token_ids.index(stop)
    done = engine.generate([ids(30)], SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids={stop}))[0]
    assert (done.token_ids, done.finish_reason) == (free.token_ids[: cut + 1], "stop")


def test_requests_of_several_threads_decode_together_and_answer_as_alone(engine):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [ids(20 + n, n) for n in range(8)]
    alone = [engine.generate([prompt], params, cache=False)[0].token_ids for prompt in prompts]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda prompt: engine.generate([prompt], params)[0].token_ids, prompts))
    assert together == alone


def test_more_requests_than_the_pool_holds_at_once_wait_their_turn():
    with Engine.random(CONFIG, dtype="float32", num_pages=12, page_size=8) as engine:
        done = engine.generate([ids(40, n) for n in range(6)], SamplingParams(max_tokens=16, ignore_eos=True))
        assert [len(one.token_ids) for one in done] == [16] * 6
        engine.cache.check()


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ([], errors.EmptyTokensError),
        ([[]], errors.EmptyTokensError),
        ([[5, -1]], errors.TokenRangeError),
        ([[5, 256]], errors.TokenRangeError),
        ([[5, 2**40]], errors.TokenRangeError),
        ([[5.5]], errors.TokenTypeError),
        ([np.zeros((2, 2), np.int32)], errors.TokenTypeError),
        (["text"], errors.ConfigError),
        ([ids(256)], errors.PromptTooLong),
        ([ids(20), ids(400)], errors.PromptTooLong),
    ],
)
def test_bad_prompts_are_named_errors_and_the_engine_goes_on(engine, prompt, error):
    before = engine.stats()
    with pytest.raises(error):
        engine.generate(prompt, SamplingParams(max_tokens=2))
    assert engine.stats() == before
    assert len(engine.generate([ids(20)], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


def test_a_request_larger_than_the_pool_is_refused_at_once():
    with Engine.random(CONFIG, dtype="float32", num_pages=4, page_size=8) as engine:
        with pytest.raises(errors.RequestTooLarge) as caught:
            engine.generate([ids(30)], SamplingParams(max_tokens=20))
        assert (caught.value.num_pages, caught.value.pool_pages) == (7, 4)
        assert len(engine.generate([ids(20)], SamplingParams(max_tokens=5, ignore_eos=True))[0].token_ids) == 5


def test_an_answer_ends_where_the_context_ends(engine):
    done = engine.generate([ids(250)], SamplingParams(max_tokens=100, ignore_eos=True))[0]
    assert (len(done.token_ids), done.finish_reason) == (6, "length")


def test_a_pool_held_by_others_fails_the_request_and_no_other():
    with Engine.random(CONFIG, dtype="float32", num_pages=8, page_size=8) as engine:
        with engine.cache.acquire(ids(56, 5)) as lease:
            lease.extend()
            with pytest.raises(errors.PoolExhausted):
                engine.generate([ids(20)], SamplingParams(max_tokens=2))
            assert len(engine.generate([ids(5)], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2
        assert len(engine.generate([ids(20)], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2
        engine.cache.check()


def test_a_forward_pass_that_fails_ends_only_whom_it_fails_for_alone(engine):
    class Failing:
        def __init__(self, runner):
            self.runner, self.calls = runner, 0

        def forward(self, works, *rest):
            self.calls += 1
            if any(len(work.tokens) == 30 for work in works):
                raise RuntimeError("device on fire")
            return self.runner.forward(works, *rest)

        def __getattr__(self, name):
            return getattr(self.runner, name)

    survivor = engine.stream(ids(20), SamplingParams(max_tokens=6, ignore_eos=True))
    next(survivor)
    real, engine.runner = engine.runner, Failing(engine.runner)
    with pytest.raises(RuntimeError, match="device on fire"):
        engine.generate([ids(30, 4)], SamplingParams(max_tokens=2))
    assert engine.runner.calls == 3, "both together, then each alone"
    engine.runner = real
    assert len([chunk for chunk in survivor if chunk.token_id is not None]) == 5
    assert len(engine.generate([ids(30, 4)], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


def test_a_closed_engine_says_so(engine):
    other = Engine.random(CONFIG, dtype="float32", num_pages=8, page_size=8)
    other.close()
    other.close()
    with pytest.raises(errors.EngineClosed):
        other.generate([ids(5)])


@pytest.mark.parametrize(
    "settings",
    [
        {"page_size": 0},
        {"page_size": 12},
        {"num_pages": 0},
        {"pool_bytes": 10},
        {"pool_bytes": 2**60},
        {"num_pages": 2**40},
        {"pool_fraction": 1.5},
        {"dtype": "int8"},
        {"device": "tpu"},
        {"max_context": 10**9},
        {"policy": "random"},
        {"weights": "int2"},
        {"exact": True, "exact_block": 24},
        {"pool_fraction": 0},
        {"page_size": 8.0},
        {"device": "meta"},
        {"prefill_chunk": 0},
    ],
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(errors.ConfigError):
        Engine.random(CONFIG, **settings)


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
        {"logprobs": 21},
        {"max_tokens": 1.5},
        {"max_tokens": "5"},
        {"top_k": 2.5},
        {"temperature": 1e-40},
        {"stop": 5},
        {"stop_token_ids": 7},
        {"stop_token_ids": ["a"]},
        {"seed": 2**70},
    ],
)
def test_sampling_that_cannot_be_is_refused(params):
    with pytest.raises(errors.ConfigError):
        SamplingParams(**params)


def test_the_pool_is_sized_by_pages_bytes_or_fraction():
    page_bytes = 2 * 2 * 8 * 2 * 16 * 4
    for settings, pages in (({"num_pages": 9}, 9), ({"pool_bytes": 20 * page_bytes + 5}, 20)):
        with Engine.random(CONFIG, dtype="float32", page_size=8, **settings) as engine:
            assert engine.store.kv.shape == (pages, 2, 2, 8, 2, 16)
            assert engine.cache.stats().num_pages == pages
    with Engine.random(CONFIG, dtype="float32", page_size=8, pool_fraction=0.001) as engine:
        assert engine.cache.stats().num_pages > 20


def test_a_config_and_settings_together_are_refused():
    with pytest.raises(errors.ConfigError):
        Engine("smollm2", EngineConfig(), page_size=8)


def test_half_precision_pools_hold_what_was_computed():
    for dtype in ("bfloat16", "float16"):
        with Engine.random(CONFIG, seed=2, dtype=dtype, num_pages=32, page_size=8) as engine:
            assert engine.store.kv.dtype == getattr(torch, dtype)
            params = SamplingParams(max_tokens=6, ignore_eos=True)
            assert engine.generate([ids(30)], params)[0].cached_tokens == 0
            assert engine.generate([ids(30)], params)[0].cached_tokens == 29


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_answers_as_the_cpu_does():
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    answers = []
    for device in ("cpu", "cuda"):
        with Engine.random(CONFIG, seed=2, dtype="float32", num_pages=64, page_size=8, device=device) as engine:
            engine.generate([ids(30)], params)
            answers.append(engine.generate([ids(37)], params)[0].token_ids)
    assert len(answers[0]) == len(answers[1]) == 12
