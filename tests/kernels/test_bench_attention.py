"""The judge of the attention benchmark lets nobody be timed who is wrong, and its cases are what they say."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.kernels.attention import measure
from bench.kernels.cases import CASES, LLAMA, TOY, TOY_CASES, Case, Inputs
from bench.kernels.contestants import Contestant, ours, plain_torch
from bench.kernels.judge import Wrong, require_right
from bench.kernels.timing import Ceilings, race, rotation

TREE = Case("tree", ((1, 16), (2, 320), (4, 16)))
FP32 = replace(TOY, dtype=torch.float32)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs(TREE, FP32, 2, torch.device("cuda" if torch.cuda.is_available() else "cpu"), seed=3)


def test_who_forgets_the_last_page_is_not_timed(inputs):
    right = next(iter(plain_torch(inputs)))
    assert require_right(right, inputs, seed=0) < 1e-5

    def forgets(layer):
        short = Inputs.__new__(Inputs)
        short.__dict__.update(inputs.__dict__, case=Case("shorter", ((1, 16), (2, 320), (4, 4))))
        return next(iter(plain_torch(short))).act(layer)

    with pytest.raises(Wrong, match="forgets on 'tree'"):
        require_right(Contestant("forgets", forgets), inputs, seed=0)


def test_who_leaves_a_row_unwritten_is_not_timed(inputs):
    right = next(iter(plain_torch(inputs)))

    def leaves(layer):
        inputs.out[:-1] = right.act(layer)[:-1]
        return inputs.out

    with pytest.raises(Wrong) as caught:
        require_right(Contestant("leaves", leaves), inputs, seed=0)
    assert math.isinf(caught.value.error)


def test_requests_of_a_node_share_its_pages_and_nothing_else(inputs):
    tables = [span.pages.tolist() for span in inputs.spans]
    assert len({page for table in tables for page in table}) == 1 + 2 * 20 + 4
    assert tables[0][:21] == tables[1][:21]
    assert tables[1][1:21] != tables[2][1:21]
    assert len({table[21] for table in tables}) == 4


def test_unused_pages_are_poisoned_and_used_ones_are_not(inputs):
    used = np.unique(np.concatenate([span.pages for span in inputs.spans]))
    poisoned = inputs.kv.isnan().flatten(1)
    assert not poisoned[torch.from_numpy(used).long().to(inputs.kv.device)].any()
    assert int(poisoned.all(1).sum()) == inputs.kv.shape[0] - len(used)


def test_grouped_and_plain_work_is_right_before_it_is_timed():
    case = TOY_CASES[3]
    toy = Inputs(case, TOY, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"), seed=1)
    assert require_right(ours(toy, share=True), toy, seed=1) > 0
    assert require_right(ours(toy, share=False), toy, seed=1) > 0


def test_a_row_holds_every_contestant_and_the_verdict():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = argparse.Namespace(seed=0, rivals=False, replays=1)
    row = measure(TOY_CASES[2], TOY, Ceilings(1e9, 1e9), device, options)
    assert {"case", "ours_ms", "sdpa_ms", "floor_ms", "% of floor", "met", "plan_ms"} <= set(row)
    assert row["floor_ms"] == pytest.approx(4 * 32 * 16.5 * 4 * 64 / 1e9 * 1e3)  # 4 * new * seen * heads * dim


def test_floors_are_those_of_the_targets():
    by_name = {case.name: case for case in CASES}
    copy, product = 3.03e12, 694e12
    assert by_name["decode 64 x 4096"].kv_bytes(LLAMA) / copy * 1e3 == pytest.approx(0.354, abs=1e-3)
    assert by_name["decode 64, 16384 shared + 512 own"].kv_bytes(LLAMA) / copy * 1e3 == pytest.approx(0.067, abs=1e-3)
    assert by_name["prefill 4096"].flops(LLAMA) / product * 1e3 == pytest.approx(0.198, abs=1e-3)
    assert by_name["prefill 512 on a cached 32768"].flops(LLAMA) / product * 1e3 == pytest.approx(0.39, abs=5e-3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_cycle_reads_far_more_than_the_cache_holds(case):
    cycle = rotation(case.kv_bytes(LLAMA), LLAMA.num_layers)
    assert 2 <= cycle <= LLAMA.num_layers
    assert cycle * case.kv_bytes(LLAMA) >= 4 * 50e6


def test_a_race_runs_everybody_on_every_input():
    seen: dict[str, list[int]] = {"a": [], "b": []}
    acts = {name: (lambda k, name=name: seen[name].append(k)) for name in seen}
    found = race(acts, cycle=3, expected_s=1.0, device=torch.device("cpu"), replays=2)
    assert seen == {"a": [0, 1, 2] * 2, "b": [0, 1, 2] * 2}
    assert all(0 < timing.p20_ms <= timing.p50_ms <= timing.p80_ms for timing in found.values())
