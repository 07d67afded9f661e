from __future__ import annotations

import random

import numpy as np
import pytest

from radixkv.policies.guard import Guard, LruShadow
from radixkv.policies.history import PageHistory, prefix_hashes
from radixkv.replay.simulate import simulate
from radixkv.replay.workload import Workload
from tests.replay.traces import random_paths, requests_of


@pytest.mark.parametrize("seed", range(20))
def test_the_shadow_hits_what_the_lru_cache_hits(seed):
    paths = random_paths(seed, num_requests=60, depth=seed % 7 + 1, fan_out=seed % 3 + 2)
    with Workload.of(requests_of(paths)) as workload:
        for capacity in range(1, workload.num_pages + 2):
            history, shadow, hits = PageHistory(capacity), LruShadow(capacity), 0
            for request, path in enumerate(paths, 1):
                kept = np.array(path[:capacity], np.int32)
                runs = history.touch(prefix_hashes(kept.tobytes(), len(kept), 1, b""), request)
                hits += shadow.touch(request, runs, len(kept))
            assert hits == simulate(workload, "lru", capacity).hit_pages


def guarded(differences, guard):
    """After how many requests the policy lost its trust, or None."""
    for number, difference in enumerate(differences, 1):
        guard.note(difference, 0)
        if not guard.trusted:
            return number
    return None


def test_a_policy_that_equals_lru_is_trusted():
    assert guarded([0] * 10_000, Guard()) is None


def test_a_policy_that_always_loses_is_dropped_at_once():
    assert guarded([-7] * 100, Guard(sigmas=2)) == 5
    assert guarded([-7] * 100, Guard(sigmas=3)) == 10


def test_a_policy_that_wins_as_often_as_it_loses_is_rarely_dropped():
    chance = random.Random(0)
    dropped = sum(
        guarded([chance.choice((-9, 0, 0, 9)) for _ in range(1000)], Guard(sigmas=3)) is not None for _ in range(50)
    )
    assert dropped <= 15


def test_a_policy_that_won_long_ago_is_dropped_when_it_loses_now():
    half_life = 100
    won = [5] * 2000
    number = guarded(won + [-5] * 2000, Guard(half_life))
    assert number is not None
    assert len(won) < number < len(won) + 4 * half_life


def test_trust_comes_back_after_a_pause_and_each_pause_is_twice_as_long():
    guard, pauses = Guard(half_life=10), []
    for _ in range(9):
        while guard.trusted:
            guard.note(0, 3)
        pauses.append(0)
        while not guard.trusted:
            guard.note(0, 3)
            pauses[-1] += 1
    assert pauses == [10, 20, 40, 80, 160, 320, 640, 640, 640]


def test_what_a_policy_that_always_loses_costs_grows_with_the_logarithm():
    guard, lost = Guard(half_life=100), []
    for _ in range(20_000):
        lost.append(guard.trusted)
        guard.note(0, 1)
    assert sum(lost[:2_000]) <= 30
    assert sum(lost) <= 60
