"""The real cache, the exact curve and the optimum: against each other, against plain code, against the study."""

from __future__ import annotations

import pytest

from radixkv.cache import PrefixCache
from radixkv.errors import ConfigError, InvariantError
from radixkv.replay.curve import lru_curve
from radixkv.replay.optimum import optimum
from radixkv.replay.reuse import Reuse
from radixkv.replay.simulate import simulate
from radixkv.replay.workload import Workload
from tests.replay.traces import DATA, best_by_search, lru_by_hand, random_paths, requests_of

# eviction.md, main table: percent of the footprint, pages, LRU, MIN (page hit rates in percent)
STUDY = {
    "conversation": [
        (1, 1708, 5.44, 24.27),
        (2, 3417, 8.01, 31.76),
        (5, 8544, 20.22, 38.19),
        (10, 17089, 28.82, 38.19),
        (20, 34179, 35.85, 38.19),
        (30, 51269, 37.28, 38.19),
        (50, 85449, 37.85, 38.19),
    ],
    "synthetic": [
        (1, 401, 3.70, 15.33),
        (2, 802, 7.75, 24.66),
        (5, 2007, 15.50, 38.71),
        (10, 4014, 25.73, 50.91),
        (20, 8029, 39.52, 61.45),
        (30, 12044, 49.37, 65.41),
        (50, 20074, 60.10, 65.94),
    ],
}


@pytest.fixture(scope="module", params=STUDY)
def study(request):
    with Workload.load([DATA / f"{request.param}_trace.jsonl.gz"]) as workload:
        yield request.param, workload, Reuse.of(workload)


def test_the_studys_capacities_and_lru_by_the_curve(study):
    name, workload, reuse = study
    curve = lru_curve(workload, reuse)
    for percent, pages, lru, _ in STUDY[name]:
        assert workload.num_pages * percent // 100 == pages
        assert 100 * curve.page_hit_rate(pages) == pytest.approx(lru, abs=0.006)


@pytest.mark.parametrize("percent", [1, 5, 10, 50])
def test_the_studys_lru_by_the_real_cache(study, percent):
    name, workload, reuse = study
    _, pages, lru, _ = next(row for row in STUDY[name] if row[0] == percent)
    row = simulate(workload, "lru", pages, check_every=3000)
    assert 100 * row.page_hit_rate == pytest.approx(lru, abs=0.006)
    exact = lru_curve(workload, reuse).row(pages)
    assert (row.hit_pages, row.hit_pairs) == (exact.hit_pages, exact.hit_pairs)


def test_the_studys_optimum(study):
    name, workload, reuse = study
    for _, pages, _, best in STUDY[name]:
        assert 100 * optimum(workload, reuse, pages).page_hit_rate == pytest.approx(best, abs=0.006)


@pytest.mark.parametrize("seed", range(30))
def test_curve_cache_and_plain_code_agree_at_every_capacity(seed):
    paths = random_paths(seed, num_requests=60, depth=seed % 7 + 1, fan_out=seed % 3 + 2)
    with Workload.of(requests_of(paths)) as workload:
        curve = lru_curve(workload, Reuse.of(workload))
        for capacity in range(1, workload.num_pages + 2):
            row = simulate(workload, "lru", capacity, check_every=7)
            assert row.hit_pages == curve.row(capacity).hit_pages == lru_by_hand(paths, capacity)
            assert row.hit_pairs == curve.row(capacity).hit_pairs
            assert row.uncached_pages == sum(max(len(path) - capacity, 0) for path in paths)


@pytest.mark.parametrize("seed", range(60))
def test_the_optimum_is_what_exhaustive_search_finds(seed):
    paths = random_paths(seed, num_requests=8, depth=4, fan_out=2)
    with Workload.of(requests_of(paths)) as workload:
        reuse = Reuse.of(workload)
        for capacity in range(1, workload.num_pages + 1):
            best = optimum(workload, reuse, capacity)
            assert best.hit_pages == best_by_search(tuple(map(tuple, paths)), capacity)
            assert best.hit_pages >= simulate(workload, "lru", capacity).hit_pages


@pytest.mark.parametrize("seed", range(10))
def test_smaller_pages_of_one_block_hit_together(seed):
    """A capacity of whole blocks gives the same hits at any page size; others lie between."""
    requests = requests_of(random_paths(seed))
    with Workload.of(requests) as whole, Workload.of(requests, page_size=1) as split:
        coarse, fine = Reuse.of(whole), Reuse.of(split)
        one, other = lru_curve(whole, coarse), lru_curve(split, fine)
        for capacity in range(1, whole.num_pages + 1):
            assert other.row(4 * capacity).hit_tokens == one.row(capacity).hit_tokens
            assert other.row(4 * capacity).hit_pairs == one.row(capacity).hit_pairs
            assert optimum(split, fine, 4 * capacity).hit_tokens == optimum(whole, coarse, capacity).hit_tokens
            assert simulate(split, "lru", 4 * capacity - 1).hit_pages == other.row(4 * capacity - 1).hit_pages


def test_the_whole_footprint_hits_all_that_can_be():
    paths = random_paths(1)
    with Workload.of(requests_of(paths)) as workload:
        reuse = Reuse.of(workload)
        reachable = workload.num_input_pages - workload.num_pages
        for capacity in (workload.num_pages, 10 * workload.num_pages):
            rows = simulate(workload, "lru", capacity), optimum(workload, reuse, capacity)
            assert {row.hit_pages for row in rows} == {lru_curve(workload, reuse).row(capacity).hit_pages} == {reachable}
            assert {row.evicted_pages for row in rows} == {0}


def test_a_prompt_longer_than_the_cache_keeps_its_beginning():
    with Workload.of(requests_of([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])) as workload:
        row = simulate(workload, "lru", 3)
        assert (row.hit_pages, row.uncached_pages, row.evicted_pages) == (3, 4, 0)
        assert optimum(workload, Reuse.of(workload), 3).hit_pages == 3


def test_requests_without_a_page_are_replayed():
    with Workload.of(requests_of([[], [], []])) as workload:
        row = simulate(workload, "lru", 3)
        reuse = Reuse.of(workload)
        assert (row.requests, row.hit_pages, row.page_hit_rate, row.hit_requests) == (3, 0, 0.0, 0)
        assert optimum(workload, reuse, 3).hit_pages == lru_curve(workload, reuse).row(3).hit_pages == 0
        assert reuse.continued(workload.lengths).tolist() == [False] * 3


@pytest.mark.pure
def test_a_tag_is_passed_only_if_given(monkeypatch):
    seen: list[int | None] = []

    class Tagged(PrefixCache):
        def acquire(self, tokens, *args, tag=None, **more):
            seen.append(tag)
            return super().acquire(tokens, *args, **more)

    monkeypatch.setattr("radixkv.replay.simulate.PrefixCache", Tagged)
    with Workload.of(requests_of([[0, 1], [0, 2], [0, 1, 3]])) as workload:
        simulate(workload, "lru", 8)
        simulate(workload, "lru", 8, tags=lambda number: number + 5)
        continued = Reuse.of(workload).continued(workload.lengths)
    assert seen == [None, None, None, 5, 6, 7]
    assert continued.tolist() == [True, False, False]


@pytest.mark.pure
def test_a_broken_cache_is_noticed_on_the_way(monkeypatch):
    calls: list[int] = []

    class Broken(PrefixCache):
        def check(self):
            calls.append(1)
            raise InvariantError("I1")

    monkeypatch.setattr("radixkv.replay.simulate.PrefixCache", Broken)
    with Workload.of(requests_of(random_paths(0))) as workload:
        for every in (5, 0):
            with pytest.raises(InvariantError):
                simulate(workload, "lru", 5, check_every=every)
    assert len(calls) == 2


def test_no_pages_and_unknown_policies_are_refused():
    with Workload.of(requests_of([[0]])) as workload:
        with pytest.raises(ConfigError, match="capacity_pages"):
            simulate(workload, "lru", 0)
        with pytest.raises(ConfigError, match="capacity_pages"):
            optimum(workload, Reuse.of(workload), 0)
        with pytest.raises(ConfigError, match="policy"):
            simulate(workload, "nonsense", 1)


def test_progress_is_told():
    steps: list[int] = []
    with Workload.of(requests_of(random_paths(0, num_requests=300))) as workload:
        simulate(workload, "lru", 5, on_requests=steps.append)
    assert steps == [128, 128]
