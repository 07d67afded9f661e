"""Run the state machine once from a seed, without shrinking: does it fail?"""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.core.machine import CacheMachine

OUR_OWN_MISTAKE = (NameError, SyntaxError, ImportError, LookupError)  # the fault's, not the tree's: caught by nothing


def drive(number: int, examples: int) -> Exception | None:
    """The first failure that `examples` runs from this seed come to, or None."""

    class Machine(CacheMachine):
        situations: Counter[str] = Counter()

    try:
        run_state_machine_as_test(
            seed(number)(Machine),
            settings=settings(
                max_examples=examples,
                stateful_step_count=40,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                verbosity=Verbosity.quiet,
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Exception as error:
        return error
    return None
