from __future__ import annotations

import mmap
import pickle
from array import array
from collections import UserList, deque

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given

from radixkv.errors import TokenError, TokenRangeError, TokenTypeError
from radixkv.prefix import TOKEN_BYTES, common_prefix_bytes
from radixkv.tokens import Tokens, token_bytes

LARGEST = 2**31 - 1
IDS = [0, 1, 7, 65535, 2]
ids_lists = st.lists(st.integers(0, LARGEST), max_size=50)


class ListOfOurs(list):
    pass


class BytesOfOurs(bytes):
    pass


def mapped(data: bytes) -> mmap.mmap:
    pages = mmap.mmap(-1, len(data))
    pages[:] = data
    return pages


RAW = np.array(IDS, np.int32).tobytes()
KINDS = {
    "list": IDS,
    "tuple": tuple(IDS),
    "list subclass": ListOfOurs(IDS),
    "list of numpy integers": list(np.array(IDS)),
    "list of 0-d tensors": list(torch.tensor(IDS)),
    "UserList": UserList(IDS),
    "deque": deque(IDS),
    **{f"array {code}": array(code, IDS) for code in "iIlLqQH"},
    **{
        f"numpy {name}": np.array(IDS, name)
        for name in ("int32", "int64", "uint16", "uint32", "uint64", ">i4", ">i8", ">u2")
    },
    "numpy non-contiguous": np.repeat(np.array(IDS, np.int32), 3)[::3],
    "numpy reversed": np.array(IDS[::-1], np.int64)[::-1],
    "numpy column": np.array([IDS, IDS], np.int32).T[:, 0],
    "numpy read-only": np.frombuffer(RAW, np.int32),
    "torch int32": torch.tensor(IDS, dtype=torch.int32),
    "torch int64": torch.tensor(IDS),
    "torch non-contiguous": torch.tensor([IDS, IDS]).T[:, 1],
    "bytes": RAW,
    "bytes subclass": BytesOfOurs(RAW),
    "bytearray": bytearray(RAW),
    "memoryview of bytes": memoryview(RAW),
    "memoryview of int32": memoryview(array("i", IDS)),
    "memoryview of int64": memoryview(array("q", IDS)),
    "memoryview non-contiguous": memoryview(array("i", [x for token in IDS for x in (token, 9)]))[::2],
    "memoryview of numpy": memoryview(np.array(IDS, np.uint16)),
    "mmap": mapped(RAW),
    "Tokens": Tokens(IDS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input_gives_the_same_tokens(kind):
    tokens = Tokens(KINDS[kind])
    assert tokens.tolist() == list(tokens) == IDS
    assert tokens.data == RAW == token_bytes(KINDS[kind])
    assert tokens == Tokens(IDS)


@pytest.mark.parametrize("ids", [array("B", [1, 200]), array("b", [1, 100]), np.array([1, 200], np.uint8)])
def test_one_byte_arrays_hold_one_id_a_byte(ids):
    assert Tokens(ids).tolist() == list(ids)


def test_a_range_is_tokens_and_large_ones_are_too():
    assert Tokens(range(3, 100_000, 7)).tolist() == list(range(3, 100_000, 7))


@pytest.mark.parametrize(
    "empty",
    [(), [], range(0), b"", bytearray(), memoryview(b""), np.array([], np.int64), array("i"), Tokens(), deque()],
)
def test_nothing_is_no_tokens(empty):
    tokens = Tokens(empty)
    assert len(tokens) == 0
    assert tokens.tolist() == list(tokens) == tokens.array.tolist() == []
    assert tokens.data == b""


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda ids: array("q", ids)])
@pytest.mark.parametrize("length", [0, 1, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("bad", [-1, -(2**31), 2**31, 2**31 + 5, 2**32 - 1, 2**32, -(2**40), 2**62])
def test_an_id_out_of_range_is_named_with_its_place(make, length, bad):
    ids = [LARGEST] * length + [bad, -7]
    with pytest.raises(TokenRangeError) as caught:
        Tokens(make(ids))
    assert (caught.value.value, caught.value.index) == (bad, length)
    assert str(bad) in str(caught.value)
    assert isinstance(caught.value, (TokenError, ValueError))


@pytest.mark.parametrize("bad", [2**63, 2**64, 2**100, -(2**100)])
def test_an_id_of_any_size_is_named(bad):
    with pytest.raises(TokenRangeError) as caught:
        Tokens([5, bad])
    assert (caught.value.value, caught.value.index) == (bad, 1)


def test_unsigned_ids_beyond_int64_are_named():
    with pytest.raises(TokenRangeError) as caught:
        Tokens(np.array([3, 2**63 + 1], np.uint64))
    assert (caught.value.value, caught.value.index) == (2**63 + 1, 1)


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda data: memoryview(data).cast("i"), mapped])
@pytest.mark.parametrize("length", [0, 2046, 2047, 2048, 9000])
def test_a_negative_id_in_raw_bytes_is_named(make, length):
    """2048 tokens are 8192 bytes, where the check changes from a slice to numpy."""
    ids = np.full(length + 2, LARGEST, np.int32)
    ids[length] = -3
    with pytest.raises(TokenRangeError) as caught:
        Tokens(make(ids.tobytes()))
    assert (caught.value.value, caught.value.index) == (-3, length)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 4097])
@pytest.mark.parametrize("make", [bytes, bytearray, lambda size: memoryview(bytes(size))])
def test_raw_bytes_come_in_fours(make, size):
    with pytest.raises(TokenTypeError) as caught:
        Tokens(make(size))
    assert str(size) in caught.value.got


BAD_TYPES = {
    "None": None,
    "a string": "12",
    "an integer": 5,
    "a numpy integer": np.int64(5),
    "a float": 1.5,
    "a set": {1},
    "a dict": {1: 2},
    "a generator": (token for token in IDS),
    "an iterator": iter(IDS),
    "floats": [1.0, 2.0],
    "one float": [1, 2, 3.0],
    "nan": [float("nan")],
    "infinity": [1, float("inf")],
    "numpy floats in a list": [np.float64(1)],
    "numpy float array": np.array([1.0, np.nan]),
    "empty numpy float array": np.array([]),
    "torch floats": torch.tensor([1.0]),
    "torch floats that need a gradient": torch.tensor([1.0], requires_grad=True),
    "torch bfloat16": torch.tensor([1], dtype=torch.bfloat16),
    "torch sparse": torch.tensor([0, 1]).to_sparse(),
    "torch meta": torch.ones(3, dtype=torch.int32, device="meta"),
    "torch booleans": torch.tensor([True]),
    "numpy booleans": np.array([True]),
    "numpy objects": np.array([1, None], object),
    "numpy complex": np.array([1j]),
    "numpy text": np.array(["1"]),
    "numpy dates": np.array(["2020-01-01"], "M8[D]"),
    "array of floats": array("f", [1]),
    "array of doubles": array("d", [1]),
    "memoryview of doubles": memoryview(array("d", [1])),
    "2-D numpy": np.ones((2, 2), np.int32),
    "0-D numpy": np.array(1),
    "2-D torch": torch.ones((1, 2), dtype=torch.int64),
    "2-D memoryview": memoryview(bytes(16)).cast("B", (4, 4)),
    "2-D list": [[1, 2], [3, 4]],
    "list of arrays": [np.array([1, 2]), np.array([3, 4])],
    "list of float tensors": [torch.tensor(1.5)],
    "strings": ["1"],
    "bytes in a list": [b"1"],
    "None in a list": [1, None],
    "a file": open(__file__, "rb"),  # noqa: SIM115, PTH123
}
BAD_TYPES["a file"].close()


@pytest.mark.parametrize("kind", BAD_TYPES)
def test_what_is_no_flat_sequence_of_integers_is_named(kind):
    with pytest.raises(TokenTypeError) as caught:
        Tokens(BAD_TYPES[kind])
    assert caught.value.got
    assert caught.value.got in str(caught.value)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)


def test_the_first_unusable_id_is_named():
    with pytest.raises(TokenTypeError) as caught:
        Tokens([1, 2, None, -1])
    assert "index 2" in caught.value.got
    with pytest.raises(TokenRangeError) as caught:
        Tokens([1, 2, -1, None])
    assert caught.value.index == 2


@given(ids_lists, st.slices(60), st.integers(-60, 60))
def test_tokens_are_indexed_and_sliced_as_a_list_is(ids, cut, index):
    tokens = Tokens(ids)
    assert len(tokens) == len(ids)
    assert tokens[cut].tolist() == ids[cut]
    assert isinstance(tokens[cut], Tokens)
    assert list(reversed(tokens)) == ids[::-1]
    assert tokens.array.tolist() == ids
    if -len(ids) <= index < len(ids):
        assert tokens[index] == ids[index]
        assert tokens.index(ids[index]) == ids.index(ids[index])
        assert ids[index] in tokens
    else:
        with pytest.raises(IndexError):
            tokens[index]


@given(ids_lists, ids_lists)
def test_tokens_are_equal_and_hash_alike_exactly_when_their_ids_are_equal(left, right):
    assert (Tokens(left) == Tokens(right)) == (left == right)
    assert hash(Tokens(left)) == hash(Tokens(np.array(left, np.int64)))
    assert Tokens(left) + right == Tokens(left + right) == Tokens(left) + Tokens(right)
    assert pickle.loads(pickle.dumps(Tokens(left))) == Tokens(left)


def test_tokens_are_no_list():
    assert Tokens([1]) != [1]
    assert Tokens([1]) in {Tokens([1])}


def test_tokens_do_not_change_with_what_they_were_made_from():
    for make in (np.array, torch.tensor, lambda ids: array("i", ids), list):
        source = make([1, 2, 3])
        tokens = Tokens(source)
        source[0] = 9
        assert tokens.tolist() == [1, 2, 3]
    source = bytearray(RAW)
    tokens = Tokens(source)
    source[0] = 1
    assert tokens.tolist() == IDS
    with pytest.raises(ValueError, match="read-only"):
        tokens.array[0] = 1


def test_tokens_of_tokens_copy_nothing():
    tokens = Tokens(range(1000))
    assert Tokens(tokens).data is tokens.data


def test_the_text_of_tokens_is_short_and_true():
    assert repr(Tokens([1, 2])) == "Tokens([1, 2])"
    assert repr(Tokens(range(1000))) == "Tokens([0, 1, 2, 3, 4, 5, 6, 7, ... 1000 in all])"


def naive_common_prefix(left: bytes, right: bytes) -> int:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count


@given(
    shared=st.integers(0, 400),
    before=st.integers(0, 9),
    left_tail=st.binary(max_size=200),
    right_tail=st.binary(max_size=200),
    mutable=st.booleans(),
)
@example(shared=0, before=0, left_tail=b"", right_tail=b"", mutable=False)
@example(shared=64, before=0, left_tail=b"a", right_tail=b"b", mutable=True)
def test_common_prefix_is_what_a_loop_finds(shared, before, left_tail, right_tail, mutable):
    run = bytes(index % 251 for index in range(shared))
    left, right = bytes(before) + run + left_tail, run + right_tail
    expected = naive_common_prefix(left[before:], right)
    assert common_prefix_bytes(left, before, bytearray(right) if mutable else right) == expected


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 192, 193, 1000, 4096, 100_000])
def test_one_changed_byte_is_found_wherever_it_is(length):
    left = bytes(length)
    for place in {0, 1, 62, 63, 64, 65, 191, 192, 193, length // 2, length - 2, length - 1} & set(range(length)):
        right = bytearray(left)
        right[place] = 255
        assert common_prefix_bytes(left, 0, right) == place
    assert common_prefix_bytes(left, 0, bytearray(left)) == length


def test_a_token_is_four_bytes():
    assert TOKEN_BYTES == np.dtype(np.int32).itemsize == 4
