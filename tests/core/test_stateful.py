from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.core.machine import SITUATIONS, CacheMachine, walk

# Derandomized, so that a run on one commit is the run on another machine; new seeds are tests/mutants/sweep.py's work.
CacheMachine.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
TestTheCacheEqualsItsModel = CacheMachine.TestCase


@pytest.mark.parametrize("seed", [1, 2])
def test_the_cache_equals_its_model_on_long_walks(seed):
    situations = walk(seed, num_worlds=60)
    assert min(situations[name] for name in SITUATIONS) >= 20, situations


def test_every_situation_occurred_at_least_20_times():
    """A machine in which nothing happens is green too: this counts what the machine above went through."""
    if not CacheMachine.situations:  # this test was picked alone
        run_state_machine_as_test(CacheMachine)
    counts = {name: CacheMachine.situations[name] for name in SITUATIONS}
    assert min(counts.values()) >= 20, counts
