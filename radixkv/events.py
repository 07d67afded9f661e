"""What happened in the cache, as values.

Every action of a `PrefixCache` emits one of these to its `on_event` callback, in order, with the cache's own tick.
Analytics, KV event streams and tests read them; nothing in the cache depends on a reader. They are NamedTuples, not
frozen dataclasses, because one is made on every look-up: 0.3 us against 1.1 us (docs/design/0003-events.md).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Event", "EventSink", "Evicted", "Looked", "Released", "Removed", "Reserved", "Stored"]


class Looked(NamedTuple):
    """A prompt was looked up and leased: `num_matched` of its `num_tokens` tokens are cached."""

    tick: int
    namespace: bytes
    lease_id: int
    owner: str
    num_tokens: int
    num_matched: int


class Reserved(NamedTuple):
    """Free pages went to a lease."""

    tick: int
    lease_id: int
    pages: array[int]


class Stored(NamedTuple):
    """A lease published pages: `tokens` (int32 bytes) start at page `start` of its path.

    The first `num_duplicate` pages' worth of tokens had been published by somebody else; the lease's own copies were
    freed. `pages` are the new pages, for what follows.
    """

    tick: int
    namespace: bytes
    lease_id: int
    start: int
    tokens: bytes
    num_duplicate: int
    pages: array[int]


class Released(NamedTuple):
    """A lease ended; `num_freed` pages that it had not published went back to the pool."""

    tick: int
    namespace: bytes
    lease_id: int
    num_tokens: int
    num_freed: int


class Evicted(NamedTuple):
    """The policy took `pages` off the end of a path, from page `start` on; they were last used at `last_tick`."""

    tick: int
    namespace: bytes
    start: int
    pages: array[int]
    last_tick: int


class Removed(NamedTuple):
    """The user asked for pages to go; `num_locked` stayed because leases hold them."""

    tick: int
    namespace: bytes
    pages: array[int]
    num_locked: int


Event = Looked | Reserved | Stored | Released | Evicted | Removed
EventSink = Callable[[Event], None]
"""Receives every event, inside the cache's lock: be quick, and do not call the cache back."""
