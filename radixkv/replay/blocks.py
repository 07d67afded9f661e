"""Block ids of a trace, made dense and prefix-exact.

    the trace's ids      [7, 9, 9, 4]   [7, 9, 5]   [8, 9]        9 is one content, in three different places
    ours                 [0, 1, 2, 3]   [0, 1, 4]   [5, 6]        equal ids, equal prefixes

Mooncake's ids name a block together with everything before it; Qwen-Bailian's name its 16 tokens only (a salted
SipHash of each block), so there one id follows many others. A page's KV depends on the whole prefix, so an id is looked
up together with the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from radixkv.errors import ConfigError
from radixkv.replay.trace import BlockArray

__all__ = ["BlockIds", "IdCounter"]

_TABLE_LIMIT = 2**25  # ids below this are looked up in arrays, larger ones in a dict
_NONE = -1


class IdCounter:
    """Hands out int32 ids from 0; shared by whatever must not collide."""

    __slots__ = ("used",)

    def __init__(self) -> None:
        self.used = 0

    def take(self, count: int) -> int:
        """Reserve `count` consecutive ids; returns the first.

        Raises:
            ConfigError: there are no more.
        """
        first = self.used
        if first + count > 2**31 - 1:
            raise ConfigError("trace", first + count, "at most 2**31 - 1 distinct pages; use a larger page size")
        self.used += count
        return first


class BlockIds:
    """Maps one trace's block ids (any non-negative integers) to dense ids that include the prefix.

    An id's first place is kept in two arrays and looked up for a whole request at once; an id met after a different one
    than the first time goes to a dict.

    Memory: 8 B for each id up to the largest below 2**25, about 150 B for each other one.

    >>> ids = BlockIds(IdCounter())
    >>> [ids.intern(request).tolist() for request in ([7, 9, 9, 4], [7, 9, 5], [8, 9])]
    [[0, 1, 2, 3], [0, 1, 4], [5, 6]]
    """

    __slots__ = ("_before", "_counter", "_dense", "_elsewhere")

    def __init__(self, counter: IdCounter) -> None:
        self._counter = counter
        self._dense = np.full(1024, _NONE, np.int32)  # the trace's id -> ours
        self._before = np.full(1024, _NONE, np.int32)  # the trace's id -> our id of the block before it
        self._elsewhere: dict[int, int] = {}  # (the trace's id, our id before it) -> ours

    def intern(self, ids: Sequence[int]) -> BlockArray:
        """Our ids of one request's blocks, in order; non-negative integers.

        Cost: a few numpy calls where every id follows the one it always follows; else about 0.2 us a block.
        """
        if not ids:
            return np.empty(0, np.int32)
        largest = max(ids)
        if largest >= _TABLE_LIMIT:
            self._grow(1 + max((raw for raw in ids if raw < _TABLE_LIMIT), default=0))
            return self._walk(ids)
        self._grow(largest + 1)
        raw = np.array(ids, np.int64)
        dense = self._dense[raw]
        num_known = len(dense) if dense[-1] != _NONE else int((dense == _NONE).argmax())
        if not self._follows(raw[:num_known], dense[:num_known]):
            return self._walk(ids)
        new = ids[num_known:]
        if new:
            if dense[num_known:].max() != _NONE or len(set(new)) < len(new):
                return self._walk(ids)
            self._add(raw, dense, num_known)
        return dense

    def _follows(self, raw: npt.NDArray[np.int64], dense: BlockArray) -> bool:
        """Whether every id is known and stands where it stood first."""
        if not len(raw):
            return True
        before = self._before[raw]
        return bool(before[0] == _NONE and dense.min() >= 0 and (before[1:] == dense[:-1]).all())

    def _add(self, raw: npt.NDArray[np.int64], dense: BlockArray, start: int) -> None:
        """Give our ids to `raw[start:]`, all new and different."""
        new = raw[start:]
        first = self._counter.take(len(new))
        dense[start:] = np.arange(first, first + len(new), dtype=np.int32)
        self._dense[new] = dense[start:]
        self._before[new] = dense[start - 1 : -1] if start else np.concatenate(([_NONE], dense[:-1]))

    def _walk(self, ids: Sequence[int]) -> BlockArray:
        """The general case, one id at a time."""
        dense, before, size, elsewhere = self._dense, self._before, len(self._dense), self._elsewhere
        result = np.empty(len(ids), np.int32)
        last = _NONE
        for index, raw in enumerate(ids):
            found = dense.item(raw) if raw < size else _NONE
            if raw < size and found == _NONE:
                found = self._counter.take(1)
                dense[raw], before[raw] = found, last
            elif raw >= size or before.item(raw) != last:
                key = raw << 32 | (last + 1)
                found = elsewhere.get(key, _NONE)
                if found == _NONE:
                    found = elsewhere[key] = self._counter.take(1)
            result[index] = last = found
        return result

    def _grow(self, size: int) -> None:
        if size > len(self._dense):
            size = min(max(size, 2 * len(self._dense)), _TABLE_LIMIT)
            self._dense = _extended(self._dense, size)
            self._before = _extended(self._before, size)


def _extended(values: BlockArray, size: int) -> BlockArray:
    larger = np.full(size, _NONE, np.int32)
    larger[: len(values)] = values
    return larger
