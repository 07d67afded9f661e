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
from radixkv.engine.structure import Structure
from radixkv.errors import ConfigError

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


def greedy(params, scores, steps, **extras):
    sampler = Sampler(params, scores.numel(), CPU, **extras)
    sampler.note(torch.tensor([0, 1, 2]))
    return [sampler.choose(scores)[0] for _ in range(steps)]


def test_presence_and_frequency_weigh_what_was_generated_and_not_the_prompt():
    scores = torch.tensor([1.0, 0.9, 0.1])
    assert greedy(SamplingParams(), scores, 3) == [0, 0, 0]
    assert greedy(SamplingParams(presence_penalty=0.5), scores, 4) == [0, 1, 0, 0], "once, however often it came"
    assert greedy(SamplingParams(frequency_penalty=0.5), scores, 5) == [0, 1, 0, 1, 2], "for each time it came"
    assert greedy(SamplingParams(frequency_penalty=-2, logit_bias={1: 1}), scores, 3) == [1, 1, 1]


def test_penalties_are_subtracted_as_openai_defines_them():
    scores = logits(5)
    sampler = Sampler(SamplingParams(presence_penalty=0.7, frequency_penalty=-0.3), 64, CPU)
    counts = torch.zeros(64)
    for _ in range(30):
        expected = scores + 0.3 * counts - 0.7 * (counts > 0)
        token = sampler.choose(scores)[0]
        assert token == int(expected.argmax())
        counts[token] += 1


def test_a_bias_is_added_and_minus_100_forbids():
    scores = logits(6)
    best, second = scores.topk(2).indices.tolist()
    assert greedy(SamplingParams(logit_bias={second: 100}), scores, 1) == [second]
    assert greedy(SamplingParams(logit_bias={best: -100}), scores + 1e6 * (torch.arange(64) == best), 1) == [second]
    drawn = frequencies(SamplingParams(temperature=100, logit_bias={best: -100}, seed=0), scores, 500)
    assert drawn[best] == 0


def test_no_end_is_chosen_before_min_tokens():
    scores = logits(7)
    best, second = scores.topk(2).indices.tolist()
    params = SamplingParams(min_tokens=3)
    assert greedy(params, scores, 5, end_ids={best, 10_000}) == [second] * 3 + [best] * 2


def test_logprobs_stay_those_of_the_untouched_logits_under_every_extra():
    scores = logits(8)
    best = int(scores.argmax())
    params = SamplingParams(logit_bias={best: -100}, presence_penalty=1, frequency_penalty=1, min_tokens=1, logprobs=2)
    token, report = Sampler(params, 64, CPU, end_ids={0}).choose(scores)
    expected = scores.log_softmax(-1)
    assert token != best
    assert report.logprob == pytest.approx(float(expected[token]), abs=1e-5)
    assert list(report.top) == expected.topk(2).indices.tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("frequency_penalty", True),
        ("logit_bias", {3: 101}),
        ("logit_bias", {3: float("nan")}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {"3": 1}),
        ("logit_bias", [3]),
        ("min_tokens", -1),
        ("min_tokens", 257),
        ("structure", "json"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(field, value):
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.setting == field


def test_an_answer_with_a_form_must_be_able_to_end():
    with pytest.raises(ConfigError, match="structure"):
        SamplingParams(structure=Structure.json_object(), ignore_eos=True)


def test_a_bias_of_a_token_that_the_model_has_not_is_refused():
    SamplingParams(logit_bias={63: 1}).require_vocabulary(64)
    with pytest.raises(ConfigError, match="64"):
        SamplingParams(logit_bias={64: 1}).require_vocabulary(64)


def test_a_bias_is_a_copy():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 3.0
    assert params.logit_bias == {1: 2.0}
