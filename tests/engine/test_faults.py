"""What must survive faults, interrupts and careless readers: right answers, no leaks, and everybody else."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from transformers import LlamaConfig

from radixkv import errors
from radixkv.engine import Engine, SamplingParams
from radixkv.engine.view import WorkingView

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(10, 256, count).tolist()


@pytest.fixture
def engine():
    with Engine.random(CONFIG, seed=1, dtype="float32", num_pages=64, page_size=8) as engine:
        yield engine
        assert engine.cache.stats().num_leases == 0
        engine.cache.check()


def answer(engine, prompt, **settings):
    return engine.generate([prompt], PARAMS, **settings)[0].token_ids


class Tripwire:
    """Stands before a runner and raises from the call on that it is set for."""

    def __init__(self, runner, error, at):
        self.runner, self.error, self.at = runner, error, at

    def forward(self, works, *rest):
        self.at -= 1
        if self.at <= 0:
            raise self.error
        return self.runner.forward(works, *rest)

    def __getattr__(self, name):
        return getattr(self.runner, name)


def test_a_view_whose_load_failed_is_not_taken_for_loaded(engine, monkeypatch):
    right = answer(engine, ids(60), cache=False)
    answer(engine, ids(60))
    with monkeypatch.context() as patch:
        engine._executor.residence.views.clear()  # so that the next request must load
        patch.setattr(WorkingView, "load", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            answer(engine, ids(60))
    assert answer(engine, ids(60)) == right
    assert answer(engine, ids(60)) == right


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("device lost")])
def test_a_step_that_breaks_off_leaves_no_wrong_page_behind(engine, error):
    expected = {seed: answer(engine, ids(30, seed), cache=False) for seed in (1, 2)}
    other = engine.stream(ids(30, 1), PARAMS)
    for _ in range(3):
        next(other)
    real, engine.runner = engine.runner, Tripwire(engine.runner, error, at=4)
    with pytest.raises(type(error)):
        answer(engine, ids(30, 2))
    engine.runner = real
    with pytest.raises((errors.RequestInterrupted, RuntimeError)):
        list(other)
    for seed, tokens in expected.items():
        for length in range(1, 12):  # every prefix of the true sequence, whatever was published of it
            prompt = ids(30, seed) + list(tokens[:length])
            assert answer(engine, prompt) == answer(engine, prompt, cache=False)
        assert answer(engine, ids(30, seed)) == tokens


def test_one_request_that_cannot_be_sampled_fails_alone(engine, monkeypatch):
    from radixkv.engine.request import Request

    good = engine.stream(ids(30, 1), PARAMS)
    next(good)
    bad = engine.stream(ids(30, 2), PARAMS)
    next(bad)
    accept = Request.accept
    poison = set(ids(30, 2))

    def failing(self, token_id, logprob):
        if set(self.prompt.tolist()) == poison:
            raise ValueError("not this one")
        return accept(self, token_id, logprob)

    monkeypatch.setattr(Request, "accept", failing)
    assert len([chunk for chunk in good if chunk.token_id is not None]) == 11
    with pytest.raises(ValueError, match="not this one"):
        list(bad)


def test_a_stream_that_is_never_read_costs_nothing(engine):
    engine.stream(ids(20), PARAMS)
    unread = engine.stream(ids(20), PARAMS)
    unread.close()
    assert len(answer(engine, ids(25))) == 12
    assert engine.stats().requests == 1


def test_an_abandoned_stream_is_taken_off(engine):
    stream = engine.stream(ids(20), PARAMS)
    next(stream)
    del stream
    gc.collect()
    assert engine.cache.stats().num_leases == 0
    assert len(answer(engine, ids(25))) == 12


def test_a_reader_gets_every_chunk_whoever_drives_the_engine(engine):
    stream = engine.stream(ids(20), PARAMS)
    next(stream)
    while engine.busy:
        engine.step()
    rest = list(stream)
    assert [chunk.token_id is None for chunk in rest] == [False] * 11 + [True]
    assert rest[-1].completion is not None


@pytest.mark.parametrize("namespace", [5, None, "x" * 2000])
def test_a_bad_namespace_is_refused_when_asked_and_harms_nobody(engine, namespace):
    with pytest.raises(errors.NamespaceError):
        engine.stream(ids(20), PARAMS, namespace=namespace)
    assert len(answer(engine, ids(25))) == 12


def test_waiting_for_pages_does_not_inflate_the_counts():
    with Engine.random(CONFIG, dtype="float32", num_pages=10, page_size=8) as engine:
        engine.generate([ids(40, seed) for seed in range(3)], SamplingParams(max_tokens=20, ignore_eos=True))
        assert engine.cache.stats().lookups <= 6, "at most one more for each request that ended meanwhile"


def test_stop_texts_need_a_tokenizer(engine):
    with pytest.raises(errors.ConfigError):
        engine.generate([ids(5)], SamplingParams(stop=("x",)))
