"""The token ids of the GPU workloads, and the benchmark that sends them, at a size for a CPU."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from bench.engine.gpu import make_engine, parse, run, send
from bench.engine.gpu_workloads import SMALL, WORKLOADS, Workload

DIGESTS = {  # of (session, tokens of the answer, tokens of the prompt, ids) of every request, in order, as int32
    "chat": "6bc1f9c7475935276c43bd36b2391bf1e6751f9a05de40bc296da7c662125337",
    "repo": "eee286e71443d2c8a05340adc0c9845239dd7f30f369dd0c5950732c46b7fe9f",
    "longdoc": "f75fcb559937598b26513f08383ab4ef5ae54eff8f85dd401ef5bdadc2b09a01",
    "single": "14f0146d361b0ed873aa76a5f7eeb92172461d7a1755295cbe73beabbbc81347",
}


def digest(workload: Workload) -> str:
    found = hashlib.sha256()
    for one in workload.rounds:
        for ask in one.asks:
            found.update(np.array([ask.session, one.max_tokens, len(ask.tokens)], "<i4").tobytes())
            found.update(ask.tokens.astype("<i4").tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_a_workload_has_the_token_ids_that_rivals_were_measured_on(name):
    assert digest(WORKLOADS[name]()) == DIGESTS[name]


@pytest.mark.parametrize("name", list(SMALL))
def test_a_small_workload_has_the_form_of_the_real_one(name):
    small, real = SMALL[name](), WORKLOADS[name]()
    assert small.name == real.name == name
    assert [len(one.asks) == 1 for one in small.rounds[:2]] == [len(one.asks) == 1 for one in real.rounds[:2]]
    goes_on = [
        len({ask.session for one in each.rounds for ask in one.asks}) == len(each.rounds[0].asks) for each in (small, real)
    ]
    assert goes_on[0] == goes_on[1]


@pytest.fixture(scope="module")
def rows():
    arguments = parse(["--small", "--max-running", "4", "--set", "prefill_chunk=64", "--cache", "both"])
    with make_engine(arguments) as engine:
        assert engine.config.prefill_chunk == 64
        return {(found["workload"], found["cache"]): found for found in run(engine, arguments)}


@pytest.mark.parametrize("name", list(SMALL))
def test_only_the_cache_changes_what_is_computed(rows, name):
    on, off = rows[name, "on"], rows[name, "off"]
    for same in ("requests", "prompt_tokens", "out_tokens"):
        assert on[same] == off[same] > 0
    assert off["hit_rate"] == 0
    assert off["computed_tokens"] == off["prompt_tokens"]
    assert on["hit_rate"] == pytest.approx(1 - on["computed_tokens"] / on["prompt_tokens"])
    assert on["hit_rate"] > 0.5


def test_a_row_says_how_many_answers_a_hit_leaves_as_they_are(rows):
    assert all(found["same_answers"] == 1 for found in rows.values())  # fp32


def test_a_session_goes_on_from_its_own_answers():
    arguments = parse(["--small", "chat"])
    with make_engine(arguments) as engine:
        workload = SMALL["chat"]()
        done = send(engine, workload, cache=True)
    first, second, third = (one.asks[0].tokens for one in workload.rounds)
    answers = [each[0].token_ids for each in done.answers]
    assert done.last_prompts[0].tolist() == [*first, *answers[0], *second, *answers[1], *third]


def test_an_unknown_workload_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["chatt"])
    assert "no workload chatt" in capsys.readouterr().err
