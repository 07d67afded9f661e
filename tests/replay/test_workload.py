from __future__ import annotations

import numpy as np
import pytest

from radixkv.errors import ConfigError
from radixkv.replay.workload import Workload, token_pairs
from tests.replay.traces import mooncake, qwen, random_paths, requests_of, write


def pages(workload, limit=10**6):
    return [np.frombuffer(path, np.int32).tolist() for path in workload.paths(limit)]


def test_pages_are_blocks_by_default(tmp_path):
    path = write(tmp_path / "t", [mooncake([5, 6, 7], 0), mooncake([5, 6, 8], 2000, tokens=1500)])
    with Workload.load([path]) as workload:
        assert pages(workload) == [[0, 1, 2], [0, 1]]
        assert (workload.page_size, workload.num_requests, workload.num_pages) == (512, 2, 3)
        assert (workload.num_input_tokens, workload.num_output_tokens, workload.num_input_pages) == (3036, 10, 5)
        assert workload.input_pairs == token_pairs(1536) + token_pairs(1500)
        assert workload.duration_s == 2.0


def test_a_block_is_split_into_smaller_pages(tmp_path):
    path = write(tmp_path / "t", [mooncake([5, 6]), mooncake([5, 9])])
    with Workload.load([path], page_size=128) as workload:
        assert pages(workload) == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 8, 9, 10, 11]]
        assert pages(workload, 6) == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 8, 9]]
        assert pages(workload, 4) == [[0, 1, 2, 3]] * 2
        assert workload.num_pages == 12


def test_whole_groups_of_blocks_make_a_larger_page(tmp_path):
    path = write(tmp_path / "t", [qwen(1, [4, 5, 6, 7, 8]), qwen(2, [4, 5, 6, 9]), qwen(3, [4])])
    with Workload.load([path], page_size=32) as workload:
        assert pages(workload) == [[0, 1], [0, 2], []]
        assert workload.lengths.tolist() == [2, 2, 0]


def test_traces_of_different_blocks_meet_at_one_page_size(tmp_path):
    large = write(tmp_path / "large", [mooncake([1], 0), mooncake([1, 2], 2000)])
    small = write(tmp_path / "small", [qwen(1, [1, 2], time_s=1.0)])
    with Workload.load([large, small], page_size=16) as workload:
        first, second, third = pages(workload)
        assert (len(first), len(second), len(third)) == (32, 2, 64)
        assert third[:32] == first
        assert not set(second) & set(third)
    with pytest.raises(ConfigError, match="blocks of 512 and of 16 tokens"):
        Workload.load([large, small])
    with pytest.raises(ConfigError, match="no --share"):
        Workload.load([large, small], page_size=16, share=True)


@pytest.mark.parametrize("page_size", [100, 768, 1000])
def test_page_and_block_sizes_must_divide(tmp_path, page_size):
    with pytest.raises(ConfigError, match="page_size"):
        Workload.load([write(tmp_path / "t", [mooncake([1, 2])])], page_size=page_size)


def test_a_page_size_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="page_size"):
        Workload(0)
    with pytest.raises(ConfigError, match="requests"):
        Workload.of([])


def test_a_limit_ends_the_reading_before_a_bad_line(tmp_path):
    path = write(tmp_path / "t", [mooncake([1]), mooncake([2]), "rubbish"])
    with Workload.load([path], limit=2) as workload:
        assert workload.num_requests == 2


def test_what_is_kept_on_disk_comes_back(monkeypatch):
    monkeypatch.setattr("radixkv.replay.workload._IN_MEMORY", 64)
    monkeypatch.setattr("radixkv.replay.workload._CHUNK", 32)
    paths = random_paths(3, num_requests=200)
    with Workload.of(requests_of(paths)) as workload:
        dense: dict[int, int] = {}
        wanted = [[dense.setdefault(page, len(dense)) for page in path] for path in paths]
        assert pages(workload) == wanted
        both = zip(workload.paths(99), workload.paths(99), strict=True)
        assert all(one == two for one, two in both), "two readers do not disturb each other"
