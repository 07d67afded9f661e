from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import radixkv.policies.history
from radixkv.policies.history import PageHistory, prefix_hashes
from tests.replay.traces import random_paths


def hashes(tokens, page_size=1, namespace=b""):
    data = np.array(tokens, np.int32).tobytes()
    return prefix_hashes(data, len(tokens) // page_size, page_size, namespace)


def users(runs):
    return [run.source for run in runs for _ in range(run.start, run.stop)]


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=40))
def test_the_last_users_of_a_path_are_those_a_dict_remembers(paths):
    history, model = PageHistory(8), {}
    for request, path in enumerate(paths, 1):
        keys = [tuple(path[: end + 1]) for end in range(len(path))]
        runs = history.touch(hashes(path), request)
        known = [model[key] for key in keys if key in model]
        assert users(runs) == known
        assert [run.start for run in runs[1:]] == [run.stop for run in runs[:-1]]
        assert len({run.source for run in runs}) == len(runs)
        model.update(dict.fromkeys(keys, request))


@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
def test_a_hash_tells_of_a_page_and_all_before_it(page_size):
    one = np.arange(8 * page_size)
    for changed in range(0, len(one), max(page_size // 2, 1)):
        other = one.copy()
        other[changed] += 1
        same = hashes(one, page_size) == hashes(other, page_size)
        assert same.tolist() == [page < changed // page_size for page in range(8)]
    assert (hashes(one[: 3 * page_size], page_size) == hashes(one, page_size)[:3]).all()
    assert not (hashes(one, page_size, b"a") == hashes(one, page_size, b"b")).any()


def test_swapped_pages_and_tokens_have_other_hashes():
    assert hashes([1, 2, 3, 4], 2)[-1] != hashes([3, 4, 1, 2], 2)[-1]
    assert hashes([1, 2], 2)[-1] != hashes([2, 1], 2)[-1]


def test_a_million_pages_have_a_million_hashes():
    assert len(np.unique(hashes(np.zeros(10**6)))) == 10**6


def test_tokens_beyond_the_last_whole_page_count_for_nothing():
    data = np.arange(7, dtype=np.int32).tobytes()
    assert (prefix_hashes(data, 3, 2, b"") == hashes(range(6), 2)).all()


def test_a_table_too_small_forgets_the_oldest_and_invents_nothing(monkeypatch):
    monkeypatch.setattr(radixkv.policies.history, "_MIN_SETS", 1)
    history = PageHistory(1)
    truth: dict[int, int] = {}
    for request, path in enumerate(random_paths(1, num_requests=500, depth=12), 1):
        found = users(history.touch(hashes(path), request))
        assert len(found) <= sum(page in truth for page in path)
        assert found == sorted(found, reverse=True)
        truth.update(dict.fromkeys(path, request))
    assert users(history.touch(hashes(path), request + 1))[: len(path)] == [request] * len(path)


def test_an_empty_path_has_no_users():
    assert PageHistory(1).touch(hashes([]), 1) == []
