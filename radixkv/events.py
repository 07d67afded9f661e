"""What happened in the cache, as values.

Every action of a `PrefixCache` emits one of these to its `on_event` callback, in order, with the cache's own tick.
Analytics, KV event streams and tests read them; nothing in the cache depends on a reader. They are plain classes, because
several are made on every request: 0.25 us each, 0.04 compiled (docs/design/0003-events.md).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import ClassVar, final

__all__ = [
    "Attached",
    "Event",
    "EventSink",
    "Evicted",
    "Looked",
    "Pinned",
    "Released",
    "Removed",
    "Reserved",
    "Stored",
    "Unpinned",
]


class Event:
    """Something that happened. Never changed once made; equal to an event of the same kind with the same fields."""

    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]] = ()

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in type(self).__match_args__)

    def __hash__(self) -> int:
        raise TypeError("events hold arrays and cannot be hashed")

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in type(self).__match_args__)
        return f"{type(self).__name__}({fields})"


@final
class Looked(Event):
    """A prompt was looked up and leased: `num_matched` of its `num_tokens` tokens are cached."""

    __slots__ = ("lease_id", "namespace", "num_matched", "num_tokens", "owner", "tick")
    __match_args__ = ("tick", "namespace", "lease_id", "owner", "num_tokens", "num_matched")

    def __init__(self, tick: int, namespace: bytes, lease_id: int, owner: str, num_tokens: int, num_matched: int) -> None:
        self.tick = tick
        self.namespace = namespace
        self.lease_id = lease_id
        self.owner = owner
        self.num_tokens = num_tokens
        self.num_matched = num_matched


@final
class Attached(Event):
    """A lease took over `num_tokens` more tokens, published since its look-up; pages it held for them are free."""

    __slots__ = ("lease_id", "namespace", "num_freed", "num_tokens", "tick")
    __match_args__ = ("tick", "namespace", "lease_id", "num_tokens", "num_freed")

    def __init__(self, tick: int, namespace: bytes, lease_id: int, num_tokens: int, num_freed: int) -> None:
        self.tick = tick
        self.namespace = namespace
        self.lease_id = lease_id
        self.num_tokens = num_tokens
        self.num_freed = num_freed


@final
class Reserved(Event):
    """Free pages went to a lease."""

    __slots__ = ("lease_id", "pages", "tick")
    __match_args__ = ("tick", "lease_id", "pages")

    def __init__(self, tick: int, lease_id: int, pages: array[int]) -> None:
        self.tick = tick
        self.lease_id = lease_id
        self.pages = pages


@final
class Stored(Event):
    """A lease published pages: `tokens` (int32 bytes) start at page `start` of its path.

    The first `num_duplicate` pages' worth of tokens had been published by somebody else; the lease's own copies were
    freed. `pages` are the new pages, for what follows.
    """

    __slots__ = ("lease_id", "namespace", "num_duplicate", "pages", "start", "tick", "tokens")
    __match_args__ = ("tick", "namespace", "lease_id", "start", "tokens", "num_duplicate", "pages")

    def __init__(
        self, tick: int, namespace: bytes, lease_id: int, start: int, tokens: bytes, num_duplicate: int, pages: array[int]
    ) -> None:
        self.tick = tick
        self.namespace = namespace
        self.lease_id = lease_id
        self.start = start
        self.tokens = tokens
        self.num_duplicate = num_duplicate
        self.pages = pages


@final
class Released(Event):
    """A lease ended; `num_freed` pages that it had not published went back to the pool."""

    __slots__ = ("lease_id", "namespace", "num_freed", "num_tokens", "tick")
    __match_args__ = ("tick", "namespace", "lease_id", "num_tokens", "num_freed")

    def __init__(self, tick: int, namespace: bytes, lease_id: int, num_tokens: int, num_freed: int) -> None:
        self.tick = tick
        self.namespace = namespace
        self.lease_id = lease_id
        self.num_tokens = num_tokens
        self.num_freed = num_freed


@final
class Evicted(Event):
    """The policy took `pages` off the end of a path, from page `start` on; they were last used at `last_tick`."""

    __slots__ = ("last_tick", "namespace", "pages", "start", "tick")
    __match_args__ = ("tick", "namespace", "start", "pages", "last_tick")

    def __init__(self, tick: int, namespace: bytes, start: int, pages: array[int], last_tick: int) -> None:
        self.tick = tick
        self.namespace = namespace
        self.start = start
        self.pages = pages
        self.last_tick = last_tick


@final
class Removed(Event):
    """The user asked for pages to go; `num_locked` stayed because leases hold them."""

    __slots__ = ("namespace", "num_locked", "pages", "tick")
    __match_args__ = ("tick", "namespace", "pages", "num_locked")

    def __init__(self, tick: int, namespace: bytes, pages: array[int], num_locked: int) -> None:
        self.tick = tick
        self.namespace = namespace
        self.pages = pages
        self.num_locked = num_locked


@final
class Pinned(Event):
    """An owner pinned the first `num_pages` pages of a path; they stay until `Unpinned`."""

    __slots__ = ("namespace", "num_pages", "owner", "pin_id", "tick")
    __match_args__ = ("tick", "namespace", "pin_id", "owner", "num_pages")

    def __init__(self, tick: int, namespace: bytes, pin_id: int, owner: str, num_pages: int) -> None:
        self.tick = tick
        self.namespace = namespace
        self.pin_id = pin_id
        self.owner = owner
        self.num_pages = num_pages


@final
class Unpinned(Event):
    """A pin of `num_pages` pages ended."""

    __slots__ = ("namespace", "num_pages", "owner", "pin_id", "tick")
    __match_args__ = ("tick", "namespace", "pin_id", "owner", "num_pages")

    def __init__(self, tick: int, namespace: bytes, pin_id: int, owner: str, num_pages: int) -> None:
        self.tick = tick
        self.namespace = namespace
        self.pin_id = pin_id
        self.owner = owner
        self.num_pages = num_pages


EventSink = Callable[[Event], None]
"""Receives every event, inside the cache's lock: be quick, and do not call the cache back."""
