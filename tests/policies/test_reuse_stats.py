from __future__ import annotations

import numpy as np
import pytest

from radixkv.policies.reuse_stats import BUCKET_ENDS, NUM_BUCKETS, ReuseStats, age_bucket, index_of, reuse_rates


def test_ages_fall_into_buckets_that_grow():
    assert [age_bucket(age) for age in (0, 0.99, 1, 1.49, 1.5, 2.24, 2.25)] == [0, 0, 1, 1, 2, 2, 3]
    assert age_bucket(1e9) == NUM_BUCKETS - 1 == len(BUCKET_ENDS) - 1


def test_without_data_the_older_page_goes_first():
    """What LRU does, then: a prior that is flat over log age falls with age."""
    index = index_of(reuse_rates(np.zeros((2, NUM_BUCKETS)), np.zeros((2, NUM_BUCKETS)), 3.0))
    assert (index[0] == index[1]).all()
    assert (np.diff(index[0, 1:-1]) < 0).all()


def test_the_index_is_the_best_ratio_of_hits_to_seconds():
    rates = np.random.default_rng(0).exponential(0.2, (3, NUM_BUCKETS))
    index = index_of(rates)
    edges = [0.0, *BUCKET_ENDS[:-1], 1.5 * BUCKET_ENDS[-2]]
    for row in range(3):
        alive = np.exp(-np.concatenate([[0], np.cumsum(rates[row])]))
        for age in range(NUM_BUCKETS):
            best = 0.0
            for stop in range(age + 1, NUM_BUCKETS + 1):
                steps = range(age, stop)
                seconds = sum((edges[i + 1] - edges[i]) * (alive[i] + alive[i + 1]) / 2 for i in steps)
                best = max(best, (alive[age] - alive[stop]) / seconds)
            assert index[row, age] == pytest.approx(best)


def test_a_class_with_much_data_speaks_for_itself_and_one_with_little_for_all():
    ended, watched = np.zeros((3, NUM_BUCKETS)), np.zeros((3, NUM_BUCKETS))
    watched[0], ended[0] = 1e6, 1e5
    watched[1], ended[1] = 1e6, 3e5
    watched[2], ended[2] = 0.1, 0.0
    rates = reuse_rates(ended, watched, 3.0)
    assert rates[0] == pytest.approx(np.full(NUM_BUCKETS, 0.1), rel=1e-2)
    assert rates[1] == pytest.approx(np.full(NUM_BUCKETS, 0.3), rel=1e-2)
    assert rates[2] == pytest.approx(np.full(NUM_BUCKETS, 0.2), rel=0.3)


def stats_of(num_requests, mean_s, until_s, num_pages=4):
    """Requests a second apart whose pages come back after an exponential time, as far as seen by then."""
    stats, chance, due = ReuseStats(2**12), np.random.default_rng(3), []
    for request in range(num_requests):
        stats.begin(request, float(request), num_pages, 0, (0, 1))
        due.append((request + chance.exponential(mean_s), request))
    for time_s, request in sorted(due):
        if time_s < until_s:
            stats.end(request, 0, num_pages, time_s)
    return stats


@pytest.mark.parametrize("until_s", [2_000, 20_000])
def test_lives_that_still_go_on_bias_nothing(until_s):
    """Half of all lives are unfinished at 2,000 s, none at 20,000 s; the index is the true one for both."""
    mean_s = 900
    index = stats_of(2_000, mean_s, until_s).index(2, 2_000, float(until_s))
    for age in (10, 60, 300, 900):
        assert index[1, age_bucket(age)] == pytest.approx(1 / mean_s, rel=0.35)


def test_pages_known_before_and_fresh_ones_are_counted_apart():
    stats = ReuseStats(2**6)
    for request in range(40):
        stats.begin(request, float(request), 10, 5, (0, 1))
        stats.end(request, 2, 8, request + 0.5)
        stats.end(request, 0, 2, request + 0.5)
    index = stats.index(3, 40, 1000.0)
    assert index[0, 0] > 1.5 * index[1, 0]
    assert stats.length_and_time(7) == (10, 7.0)


def test_what_left_the_window_is_forgotten():
    stats = ReuseStats(2**4)
    for request in range(20):
        stats.begin(request, float(request), 3, 0, (0, 1))
    assert stats.length_and_time(3) is None
    stats.end(3, 0, 3, 30.0)  # of a request nobody remembers
    assert stats.length_and_time(4) == (3, 4.0)
    stats.end(4, 0, 3, 30.0)
    with_it = stats.index(2, 19, 40.0)
    stats.begin(20, 40.0, 3, 0, (0, 1))
    without = stats.index(2, 20, 40.0)
    assert with_it[1].sum() > without[1].sum()


def test_the_index_of_nothing_is_finite():
    assert np.isfinite(ReuseStats(16).index(5, 1, 0.0)).all()
