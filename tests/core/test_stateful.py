from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.core.machine import SITUATIONS, CacheMachine

CacheMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCacheEqualsItsModel = CacheMachine.TestCase


def test_every_situation_occurred_at_least_20_times():
    missing = {name: CacheMachine.situations[name] for name in SITUATIONS if CacheMachine.situations[name] < 20}
    assert not missing, dict(CacheMachine.situations)
