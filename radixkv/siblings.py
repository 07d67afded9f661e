"""The first pages of many siblings, arranged so that the one closest to a probe is found without looking at all.

Most probes share no token with any sibling, which one dictionary look-up tells. Of those siblings that begin with the
probe's first token, the one with the longest common prefix is a neighbour of the probe in sorted order.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Final, NamedTuple, final

from sortedcontainers import SortedList

from radixkv.prefix import TOKEN_BYTES, common_prefix_bytes

__all__ = ["Closest", "Siblings", "closest_of"]

_LONG: Final = 1024  # keys; up to here moving the rest of a plain list is cheaper than keeping sublists


class Closest(NamedTuple):
    """A sibling's key, and how many tokens of it continue the match; none: 0 tokens, and no key."""

    key: bytes
    num_tokens: int


@final
class Siblings:
    """Keys of one length, by their first token; those of one first token in sorted order.

    Args:
        keys: the first pages of the siblings.

    Cost: add, remove and closest are O(log n) of those that share a first token, O(1) for a token of its own.
    """

    __slots__ = ("_by_head",)

    def __init__(self, keys: Iterable[bytes]) -> None:
        self._by_head: dict[bytes, list[bytes] | SortedList[bytes]] = {}
        for key in keys:
            self.add(key)

    def add(self, key: bytes) -> None:
        """Put in a key that is not there."""
        head = key[:TOKEN_BYTES]
        alike = self._by_head.get(head)
        if alike is None:
            self._by_head[head] = [key]
        elif isinstance(alike, list):
            insort(alike, key)
            if len(alike) > _LONG:
                self._by_head[head] = SortedList(alike)
        else:
            alike.add(key)

    def remove(self, key: bytes) -> None:
        """Take out a key that is there."""
        head = key[:TOKEN_BYTES]
        alike = self._by_head[head]
        if len(alike) == 1:
            del self._by_head[head]
        else:
            alike.remove(key)

    def closest(self, probe: bytes) -> Closest:
        """The key with the longest common prefix with `probe`."""
        alike = self._by_head.get(probe[:TOKEN_BYTES])
        if alike is None:
            return Closest(b"", 0)
        index = bisect_left(alike, probe) if isinstance(alike, list) else alike.bisect_left(probe)
        return closest_of(alike[max(index - 1, 0) : index + 1], probe)

    def keys(self) -> list[bytes]:
        """All of them; for checks."""
        return [key for alike in self._by_head.values() for key in alike]


def closest_of(keys: Iterable[bytes], probe: bytes) -> Closest:
    """The key with the longest common prefix with `probe`, by looking at all. Cost: O(keys)."""
    head = probe[:TOKEN_BYTES]
    best, best_key = 0, b""
    if len(head) == TOKEN_BYTES:
        for key in keys:
            if key.startswith(head):
                common = common_prefix_bytes(probe, 0, key) // TOKEN_BYTES
                if common > best:
                    best, best_key = common, key
    return Closest(best_key, best)
