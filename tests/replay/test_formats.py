from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv.errors import ConfigError, RadixKVError
from radixkv.replay.blocks import BlockIds, IdCounter
from radixkv.replay.errors import TraceError
from radixkv.replay.formats import read_trace, read_traces
from radixkv.replay.triedelta import DeltaTree
from tests.replay.traces import HEADER, mooncake, qwen, write


def blocks(requests):
    return [request.blocks.tolist() for request in requests]


@pytest.mark.parametrize("packed", [False, True])
def test_a_mooncake_trace_is_read(tmp_path, packed):
    path = write(tmp_path / "t", [mooncake([7, 9], 0), mooncake([7, 9, 4], 1500, tokens=1400)], packed)
    first, second = read_trace(path)
    assert (first.time_s, first.num_input_tokens, first.num_output_tokens) == (0.0, 1024, 5)
    assert second.time_s == 1.5
    assert second.block_tokens == 512
    assert (second.continues, second.turn, second.kind) == (None, None, "")
    assert blocks([first, second]) == [[0, 1], [0, 1]], "the partial last block is dropped"


@pytest.mark.parametrize("packed", [False, True])
def test_a_qwen_trace_is_read(tmp_path, packed):
    lines = [qwen(5, [3, 3, 8], time_s=0.25), qwen(6, [3, 3, 9, 3], parent=5, time_s=61.114, type="image", turn=2)]
    first, second = read_trace(write(tmp_path / "t", lines, packed))
    assert (first.continues, first.turn, first.kind, first.time_s) == (False, 1, "text", 0.25)
    assert (second.continues, second.turn, second.kind, second.block_tokens) == (True, 2, "image", 16)
    assert blocks([first, second]) == [[0, 1, 2], [0, 1, 3, 4]], "an id names a block, not its prefix"


def test_a_qwen_request_may_hash_fewer_blocks_than_it_has_tokens(tmp_path):
    (request,) = read_trace(write(tmp_path / "t", [qwen(1, [4, 5], input_length=16 * 40)]))
    assert (request.num_input_tokens, len(request.blocks)) == (640, 2)


@pytest.mark.parametrize("packed", [False, True])
def test_a_triedelta_trace_is_read(tmp_path, packed):
    rows = [[0, 1536, 5, -1, 0, 3], [9, 1100, 5, 0, 1, 1], [20, 2000, 5, 0, 3, 1], [30, 1600, 5, 1, 2, 1]]
    requests = list(read_trace(write(tmp_path / "t", [HEADER, *rows], packed)))
    assert blocks(requests) == [[0, 1, 2], [0, 3], [0, 1, 2], [0, 3, 5]], "2000 tokens are 3 whole blocks"
    assert [request.continues for request in requests] == [False, False, True, True]
    assert requests[3].time_s == 0.03


@pytest.mark.parametrize("seed", range(5))
def test_deltas_expand_alike_however_few_requests_are_at_hand(seed):
    chance = np.random.default_rng(seed)
    trees = [DeltaTree(IdCounter(), kept) for kept in (0, 40, 10**6)]
    for number in range(200):
        parent = int(chance.integers(-1, number)) if number else -1
        shared = int(chance.integers(0, trees[0].num_blocks(parent) + 1)) if parent >= 0 else 0
        new = int(chance.integers(0, 9))
        none, few, all_ = (tree.add(parent, shared, new).tolist() for tree in trees)
        assert none == few == all_


IDS = st.sampled_from([0, 1, 2, 5, 3000, 3999, 4000, 2**40, 2**70])


@given(st.lists(st.lists(IDS, max_size=6), max_size=30))
@settings(max_examples=300, deadline=None)
def test_equal_ids_exactly_where_prefixes_are_equal(requests):
    model: dict[tuple[int, ...], int] = {}
    ids = BlockIds(IdCounter())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("radixkv.replay.blocks._TABLE_LIMIT", 4000)
        for request in requests:
            # numbered as they come, so the model's numbers are ours
            wanted = [model.setdefault(tuple(request[: end + 1]), len(model)) for end in range(len(request))]
            assert ids.intern(request).tolist() == wanted


GOOD = json.dumps(mooncake([1, 2], 10))
BAD_LINES = [
    ("{", "", "is not JSON"),
    ("[1, 2]", "", "is not a JSON object"),
    ("7", "", "is not a JSON object"),
    ('{"timestamp": 11, "input_length": 5, "output_length": 1}', "hash_ids", "missing"),
    ('{"input_length": 5, "output_length": 1, "hash_ids": []}', "timestamp", "missing"),
    (GOOD[:-1] + ', "input_length": 1024}', "input_length", "given twice"),
    (GOOD.replace("1024", "-1024"), "input_length", "expected 0 to"),
    (GOOD.replace("1024", "1024.0"), "input_length", "expected an integer, got 1024.0"),
    (GOOD.replace("1024", "true"), "input_length", "expected an integer, got True"),
    (GOOD.replace("1024", '"1024"'), "input_length", "expected an integer"),
    (GOOD.replace("1024", "9" * 400), "input_length", "an integer of 1329 bits"),
    (GOOD.replace("1024", "9" * 5000), "", "is not usable JSON"),
    (GOOD.replace("1024", "5000"), "hash_ids", "2 ids for 5000 tokens, which are 10 blocks of 512"),
    (GOOD.replace("1024", "100"), "hash_ids", "--block-tokens"),
    (GOOD.replace('"output_length": 5', '"output_length": null'), "output_length", "expected an integer, got None"),
    (GOOD.replace("[1, 2]", "[1, -2]"), "hash_ids[1]", "got -2"),
    (GOOD.replace("[1, 2]", "[1.5, 2]"), "hash_ids[0]", "expected an integer, got 1.5"),
    (GOOD.replace("[1, 2]", "[1, true]"), "hash_ids[1]", "got True"),
    (GOOD.replace("[1, 2]", f"[1, {2**300}]"), "hash_ids[1]", "an integer of 301 bits"),
    (GOOD.replace("[1, 2]", '"1"'), "hash_ids", "expected a list"),
    (GOOD.replace('"timestamp": 10', '"timestamp": 9'), "timestamp", "9 is earlier"),
    (GOOD.replace('"timestamp": 10', '"timestamp": -1'), "timestamp", "expected a time"),
    (GOOD.replace('"timestamp": 10', f'"timestamp": {-(10**400)}'), "timestamp", "expected a time"),
    (GOOD.replace('"timestamp": 10', '"timestamp": 1e999'), "timestamp", "expected a time"),
    (GOOD.replace('"timestamp": 10', '"timestamp": NaN'), "", "NaN is not a number"),
    (GOOD.replace('"timestamp": 10', '"timestamp": "now"'), "timestamp", "expected a number"),
    ("[" * 100_000, "", "is not usable JSON"),
]


@pytest.mark.parametrize(("line", "field", "reason"), BAD_LINES, ids=[str(i) for i in range(len(BAD_LINES))])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_names_file_line_and_field(tmp_path, packed, line, field, reason):
    path = write(tmp_path / "trace.jsonl", [GOOD, "", line], packed)
    requests = read_trace(path)
    next(requests)
    with pytest.raises(TraceError) as caught:
        next(requests)
    error = caught.value
    assert isinstance(error, RadixKVError)
    assert (error.file, error.line, error.field) == (str(path), 3, field)
    assert reason in error.reason
    assert f"{path}, line 3" in str(error)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"chat_id": -1}, "chat_id"),
        ({"chat_id": "a"}, "chat_id"),
        ({"parent_chat_id": -2}, "parent_chat_id"),
        ({"parent_chat_id": 1}, "parent_chat_id"),
        ({"type": 3}, "type"),
        ({"turn": 1.5}, "turn"),
        ({"hash_ids": [1, 2, 3, 4]}, "hash_ids"),
    ],
)
def test_a_bad_field_of_a_qwen_trace_is_named(tmp_path, change, field):
    with pytest.raises(TraceError) as caught:
        list(read_trace(write(tmp_path / "t", [qwen(1, [4, 5, 6]) | change])))
    assert (caught.value.line, caught.value.field) == (1, field)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ([5, 512, 1, 1, 0, 1], "parent_request"),
        ([5, 512, 1, -2, 0, 1], "parent_request"),
        ([5, 512, 1, -1, 1, 0], "shared_blocks"),
        ([5, 2048, 1, 0, 4, 0], "shared_blocks"),
        ([5, 512, 1, 0, -1, 2], "shared_blocks"),
        ([5, 512, 1, 0, 0, 2], "new_blocks"),
        ([5, 512, 1, 0, 0, 10**12], "new_blocks"),
        ([5, 2**40, 1, 0, 0, 2**31], "input_length"),
        ([-5, 512, 1, 0, 1, 0], "timestamp_ms"),
        ([0, 512, 1, 0, 1, 0], "timestamp_ms"),
        ([5, 512, "1", 0, 1, 0], "output_length"),
        ([5, 512, 1, 0, 1], ""),
        ({"timestamp": 5}, ""),
    ],
)
def test_a_bad_field_of_a_triedelta_trace_is_named(tmp_path, row, field):
    requests = read_trace(write(tmp_path / "t", [HEADER, [4, 1024, 5, -1, 0, 2], row]))
    next(requests)
    with pytest.raises(TraceError) as caught:
        next(requests)
    assert (caught.value.line, caught.value.field) == (3, field)


@pytest.mark.parametrize(
    ("header", "field"),
    [
        (HEADER | {"format": "triedelta-2"}, "format"),
        (HEADER | {"format": None}, "format"),
        (HEADER | {"block_tokens": 0}, "block_tokens"),
        (HEADER | {"block_tokens": None}, "block_tokens"),
        (HEADER | {"fields": HEADER["fields"][::-1]}, "fields"),
        ({"prompt": "hello"}, "hash_ids"),
        ([1, 2], ""),
        ("text", ""),
    ],
)
def test_a_wrong_header_is_named(tmp_path, header, field):
    with pytest.raises(TraceError) as caught:
        list(read_trace(write(tmp_path / "t", [header, [4, 1024, 5, -1, 0, 2]])))
    assert (caught.value.line, caught.value.field) == (1, field)


def test_a_truncated_gzip_file_gives_what_it_has_and_then_an_error(tmp_path):
    whole = write(tmp_path / "whole", [mooncake([i, i + 1], i) for i in range(0, 3000, 2)], packed=True)
    path = tmp_path / "cut.gz"
    path.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(TraceError, match="the gzip stream ends early") as caught:
        list(read_trace(path))
    assert 1 < caught.value.line <= 1501


def test_a_damaged_gzip_file_is_an_error(tmp_path):
    data = bytearray(gzip.compress(b"\n".join([GOOD.encode()] * 500)))
    data[len(data) // 2] ^= 255
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(TraceError):
        list(read_trace(tmp_path / "t"))
    (tmp_path / "t").write_bytes(gzip.compress(GOOD.encode() + b"\n") + b"rubbish")
    with pytest.raises(TraceError, match="cannot be read"):
        list(read_trace(tmp_path / "t"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (gzip.compress(b""), "the file is empty"),
        (json.dumps(HEADER).encode(), "no requests"),
        (b'{"timestamp": "\xff"}', "not UTF-8"),
    ],
)
def test_a_file_without_requests_is_an_error(tmp_path, data, reason):
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(TraceError, match=reason):
        list(read_trace(tmp_path / "t"))


def test_a_byte_order_mark_is_no_error(tmp_path):
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert blocks(read_trace(tmp_path / "t")) == [[0, 1]]


def test_an_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("radixkv.replay.lines._MAX_LINE_BYTES", 1000)
    with pytest.raises(TraceError, match="longer than 999 bytes") as caught:
        list(read_trace(write(tmp_path / "t", [GOOD, " " * 2000])))
    assert caught.value.line == 2


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(TraceError, match="cannot be opened"):
            list(read_trace(path))
    with pytest.raises(ConfigError):
        read_traces([])


def test_several_traces_are_merged_by_time_and_share_nothing(tmp_path):
    one = write(tmp_path / "one", [mooncake([1, 2], 0), mooncake([1, 2, 3], 20)])
    two = write(tmp_path / "two", [mooncake([1, 2], 10), mooncake([1, 2], 30)])
    three = write(tmp_path / "three", [HEADER, [15, 1024, 1, -1, 0, 2]])
    merged = list(read_traces([one, two, three]))
    assert [request.time_s for request in merged] == [0, 0.01, 0.015, 0.02, 0.03]
    by_trace = [set(blocks(merged)[i]) for i in range(3)]
    assert not by_trace[0] & by_trace[1] and not by_trace[2] & (by_trace[0] | by_trace[1])
    assert blocks(merged)[1] == blocks(merged)[4]


def test_traces_share_blocks_when_asked(tmp_path):
    one = write(tmp_path / "one", [mooncake([1, 2], 0)])
    two = write(tmp_path / "two", [mooncake([1, 3], 10)])
    first, second = blocks(read_traces([one, two], share=True))
    assert first[0] == second[0] and first[1] != second[1]


def test_progress_adds_up_to_the_files(tmp_path):
    path = write(tmp_path / "t", [mooncake([i, i + 1], i) for i in range(1000)], packed=True)
    steps: list[int] = []
    list(read_trace(path, on_bytes=steps.append))
    assert sum(steps) == path.stat().st_size


def test_block_tokens_can_be_given(tmp_path):
    path = write(tmp_path / "t", [mooncake([1, 2, 3], tokens=100)])
    (request,) = read_trace(path, block_tokens=40)
    assert (request.block_tokens, len(request.blocks)) == (40, 2)
