"""The sampler against transformers' own processors, and against the distribution it should draw from."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from radixkv.engine import SamplingParams
from radixkv.engine.sampler import Sampler

CPU = torch.device("cpu")


def logits(seed: int = 0, size: int = 64) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def frequencies(params: SamplingParams, scores: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    sampler = Sampler(params, scores.numel(), CPU)
    counts = torch.zeros(scores.numel())
    for _ in range(draws):
        counts[sampler.choose(scores)[0]] += 1
    return counts / draws


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
        ({"temperature": 1.0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
            [TemperatureLogitsWarper(1.3), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
        ),
    ],
)
def test_draws_follow_the_distribution_that_transformers_processors_give(params, processors):
    scores = logits()
    expected = LogitsProcessorList(processors)(torch.zeros(1, 1, dtype=torch.long), scores[None])[0].softmax(-1)
    got = frequencies(SamplingParams(**params, seed=3), scores)
    assert not got[expected == 0].any(), "a token that is cut off was drawn"
    assert (got - expected).abs().max() < 0.03


def test_the_repetition_penalty_is_that_of_transformers():
    scores, prompt = logits(1), torch.tensor([3, 9, 9, 40])
    expected = RepetitionPenaltyLogitsProcessor(1.8)(prompt[None], scores[None])[0].argmax()
    sampler = Sampler(SamplingParams(repetition_penalty=1.8), 64, CPU)
    sampler.note(prompt)
    first = sampler.choose(scores)[0]
    assert first == expected
    again = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([[3, 9, 40, first]]), scores[None])[0].argmax()
    assert sampler.choose(scores)[0] == again


def test_a_seed_repeats_and_another_does_not():
    scores = logits(2)
    runs = []
    for seed in (1, 1, 2):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), 64, CPU)
        runs.append([sampler.choose(scores)[0] for _ in range(40)])
    assert runs[0] == runs[1] != runs[2]


def test_temperature_0_and_top_k_1_take_the_likeliest():
    scores = logits(3)
    for params in (
        SamplingParams(),
        SamplingParams(temperature=5.0, top_k=1),
        SamplingParams(temperature=1, top_p=1e-6),
    ):
        assert {Sampler(params, 64, CPU).choose(scores)[0] for _ in range(20)} == {int(scores.argmax())}


def test_logprobs_are_of_the_untouched_logits():
    scores = logits(4)
    params = SamplingParams(temperature=0.3, repetition_penalty=1.5, logprobs=3, seed=0)
    token, report = Sampler(params, 64, CPU).choose(scores)
    expected = scores.log_softmax(-1)
    assert report.token_id == token
    assert report.logprob == pytest.approx(float(expected[token]), abs=1e-5)
    assert list(report.top) == expected.topk(3).indices.tolist()
