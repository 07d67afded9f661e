"""Each planted fault is caught by the very walk that the clean tree passes."""

from __future__ import annotations

import pytest

from radixkv.errors import InvariantError
from tests.core.limits import limits_walk
from tests.core.machine import walk
from tests.core.test_threads import share_prefixes
from tests.mutants.faults import FAULTS, LIMIT_FAULTS, LIMIT_WORLDS, THREAD_FAULTS, WORLDS, planted

SEED = 0

# Errors that a mangled fault would raise by itself: they would prove nothing.
MANGLED = (NameError, SyntaxError, ImportError)


def test_the_clean_tree_passes_the_walk_that_catches_the_faults():
    walk(SEED, WORLDS)
    limits_walk(SEED, LIMIT_WORLDS)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_is_caught(fault):
    with planted(fault), pytest.raises(Exception) as caught:  # noqa: PT011
        walk(SEED, WORLDS)
    assert not isinstance(caught.value, MANGLED), caught.value


@pytest.mark.parametrize("fault", LIMIT_FAULTS)
def test_the_fault_is_caught_by_the_walk_through_limits(fault):
    with planted(fault), pytest.raises(Exception) as caught:  # noqa: PT011
        limits_walk(SEED, LIMIT_WORLDS)
    assert not isinstance(caught.value, MANGLED), caught.value


@pytest.mark.parametrize("fault", THREAD_FAULTS)
def test_the_fault_is_caught_by_threads(fault):
    """Which thread goes first is chance; one of three tries sees it (60 of 60 single tries did)."""
    caught = []
    with planted(fault):
        for _ in range(3):
            try:
                share_prefixes(200)
            except Exception as error:
                caught.append(error)
    assert caught
    assert not any(isinstance(error, MANGLED) for error in caught), caught


def test_a_fault_is_gone_after_its_block():
    before = {edit: vars(edit.owner)[edit.method] for edits in FAULTS.values() for edit in edits}
    with pytest.raises(InvariantError), planted("duplicate pages leak"):
        walk(SEED, WORLDS)
    for fault in FAULTS:
        with planted(fault):
            assert any(vars(edit.owner)[edit.method] is not before[edit] for edit in FAULTS[fault])
    assert all(vars(edit.owner)[edit.method] is real for edit, real in before.items())
