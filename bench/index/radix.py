"""radixkv behind the bench's interface: namespaces, events, leases and matches inside pages all switched on."""

from __future__ import annotations

from typing import Any

from bench.index.workloads import PAGE, Request
from radixkv import PrefixCache, Tokens
from radixkv.events import Event

NAMESPACE = "tenant-a"
EVENTS = 256  # kept before the list is emptied, as a subscriber would


class RadixIndex:
    """A `PrefixCache` that is given tokens in one form."""

    page_size = PAGE
    exact = True
    keep_last = False
    evicts = True

    def __init__(self, capacity_tokens: int, num_sessions: int, form: str) -> None:
        self._events: list[Event] = []
        self.cache = PrefixCache(num_pages=capacity_tokens // PAGE, page_size=PAGE, on_event=self._events.append)
        self.prepare = {
            "Tokens": self._tokens,
            "int32 array": self._array,
            "list[int]": self._list,
            "cursor": self._new_tokens,
        }[form]
        if form == "cursor":
            self._cursors = [self.cache.cursor(NAMESPACE) for _ in range(num_sessions)]
            self.lookup = self._lookup_cursor

    def _drain(self) -> None:
        if len(self._events) > EVENTS:
            self._events.clear()

    def _tokens(self, request: Request) -> Tokens:
        self._drain()
        return Tokens(request.prompt)

    def _array(self, request: Request) -> Any:
        self._drain()
        return request.prompt

    def _list(self, request: Request) -> list[int]:
        self._drain()
        return request.prompt.tolist()

    def _new_tokens(self, request: Request) -> tuple[Any, Tokens]:
        self._drain()
        return self._cursors[request.session], Tokens(request.prompt[request.num_old :])

    def lookup(self, given: Any) -> int:
        """Acquire."""
        self._lease = self.cache.acquire(given, NAMESPACE)
        return self._lease.num_matched

    def _lookup_cursor(self, given: Any) -> int:
        """Append the new tokens, and acquire."""
        cursor, new = given
        cursor.append(new)
        self._lease = self.cache.acquire(cursor)
        return self._lease.num_matched

    def compute(self) -> None:
        """Nothing to make ready."""

    def insert(self) -> None:
        """Extend, commit, release."""
        lease = self._lease
        lease.extend()
        lease.commit()
        lease.release()
        del self._lease

    def evict(self, num_tokens: int) -> int:
        """Free pages of the coldest leaves."""
        return self.cache.evict(-(-num_tokens // PAGE)) * PAGE

    def num_cached(self) -> int:
        """Tokens in the tree."""
        stats = self.cache.stats()
        return (stats.num_pages - stats.num_free) * PAGE

    def check(self) -> None:
        """Recount every invariant."""
        self.cache.check()
