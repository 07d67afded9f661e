"""Common prefixes of token bytes, at memcmp speed."""

from __future__ import annotations

from typing import Final

__all__ = ["TOKEN_BYTES", "common_prefix_bytes"]

TOKEN_BYTES: Final = 4
"""Bytes of one token id."""


def common_prefix_bytes(left: bytes, offset: int, right: bytes | bytearray) -> int:
    """Length in bytes of the common prefix of `left[offset:]` and `right`.

    Gallops: doubles a compared run until it differs, then halves into it. Cost: O(prefix), at memcmp speed.
    """
    limit = min(len(left) - offset, len(right))
    low, step = 0, 64
    while low < limit:
        high = min(low + step, limit)
        if not left.startswith(right[low:high], offset + low):
            break
        low, step = high, step * 2
    else:
        return limit
    while high - low > 64:
        middle = (low + high) // 2
        if left.startswith(right[low:middle], offset + low):
            low = middle
        else:
            high = middle
    size = high - low
    here = int.from_bytes(left[offset + low : offset + high], "big")
    there = int.from_bytes(right[low:high], "big")
    return low + size - ((here ^ there).bit_length() + 7) // 8
