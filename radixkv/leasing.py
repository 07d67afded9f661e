"""Leasing: what leases and pins do over the pages and the tree.

    one lease over its sequence, in pages           owner
    [0, published)            path pages            the tree, locked by this lease
    [published, +len(own))    own pages             this lease
    the rest                  no page yet           -

Every page has exactly one owner at any time. A call that raises has changed nothing: pages are allocated before
anything moves. An event is told when all of its change is done, so that every invariant holds at it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from threading import RLock
from typing import final

from radixkv.allocator import Allocator
from radixkv.cover import PathEnd, by_namespace, cover, num_covered
from radixkv.errors import ConfigError, PoolExhausted, QuotaExceeded
from radixkv.events import Attached, Event, EventSink, Evicted, Looked, Pinned, Released, Reserved, Stored, Unpinned
from radixkv.lease import Cursor, Lease
from radixkv.match import Insertion, Match
from radixkv.node import Account, Node
from radixkv.pins import Pin, PinCost, Pins
from radixkv.prefix import TOKEN_BYTES
from radixkv.quota import Quotas
from radixkv.retention import Retention

__all__ = ["Leasing"]


@final
class Leasing:
    """The live leases and pins of a cache, and what they hold.

    Not thread-safe: whoever calls from outside (`PrefixCache`, `Lease`, `Cursor`, `Pin`) holds `lock`.

    Args:
        allocator: the pool, the tree and the policy; tells this object what it evicts.
        pins: the live pins, none yet.
        lock: the cache's.
        on_event: called with every event; None: nobody listens.
        clock: seconds, as the nodes' `time_s`.

    Attributes:
        page_size: tokens in a page.
        leases: those not yet released, by id, oldest first.
        num_leased: pages that leases have reserved and not published.
        pins, lock: as given.
        num_lookups, num_lookup_tokens, num_hit_tokens, num_evicted: counts since the start; the last is of pages.
    """

    __slots__ = (
        "_allocator",
        "_clock",
        "_next",
        "_on_event",
        "_page_bytes",
        "_tick",
        "_tree",
        "_wide",
        "leases",
        "lock",
        "num_evicted",
        "num_hit_tokens",
        "num_leased",
        "num_lookup_tokens",
        "num_lookups",
        "page_size",
        "pins",
    )

    def __init__(
        self, allocator: Allocator, pins: Pins, lock: RLock, on_event: EventSink | None, clock: Callable[[], float]
    ) -> None:
        self._allocator = allocator
        self._tree = allocator.tree
        self._on_event = on_event
        self._clock = clock
        self._page_bytes = allocator.tree.page_size * TOKEN_BYTES
        self._wide: dict[int, Lease] = {}  # those whose match ended inside an edge: they lock more of it than they use
        self._next = 1
        self.lock = lock
        self.page_size = allocator.tree.page_size
        self.pins = pins
        self.leases: dict[int, Lease] = {}
        self._tick = 0
        self.num_leased = self.num_lookups = self.num_lookup_tokens = self.num_hit_tokens = self.num_evicted = 0
        allocator.on_evicted = self._evicted

    # -- leases -------------------------------------------------------------------------------------------------------

    def open(self, namespace: bytes, data: bytes, limit: int, owner: str, tag: int, wishes: Retention | None) -> Lease:
        """Lease the longest cached prefix of `data`, or of its first `limit` tokens unless that is -1. Cost: O(T)."""
        found = self._tree.match(self._tree.root(namespace), 0, data)
        return self._open(namespace, data, found, None, limit, owner, tag, wishes)

    def open_cursor(self, cursor: Cursor, limit: int, owner: str, tag: int, wishes: Retention | None) -> Lease:
        """As `open`, of an idle cursor's sequence, from where it last ended. Cost: O(new tokens)."""
        node, position = self._tree.climb(cursor._node, cursor._position)
        found = self._tree.match(node, position, bytes(cursor._data[position * self._page_bytes :]))
        return self._open(cursor._namespace, cursor._data, found, cursor, limit, owner, tag, wishes)

    def extend(self, lease: Lease, data: bytes, num_spare: int) -> None:
        """Append `data`, and reserve pages for the sequence then and `num_spare` tokens more. Cost: O(new tokens + pages).

        Raises:
            PoolExhausted, QuotaExceeded: too few can be had. LeaseReleased: the lease has ended.
        """
        lease._require_live()
        num_tokens = (len(lease._data) + len(data)) // TOKEN_BYTES
        needed = -(-(num_tokens + num_spare) // self.page_size) - lease._published - len(lease._own)
        pages = self._allocate_for(lease, needed) if needed > 0 else None
        if data:
            if not isinstance(lease._data, bytearray):
                lease._data = bytearray(lease._data)
            lease._data += data
        if pages is not None:
            lease._own += pages
            if lease._path is not None:
                lease._path = lease._path + pages  # a new array: whoever views the old one keeps it
            self.num_leased += needed
            lease._node.account.num_leased += needed
            self._tick += 1
            if self._on_event is not None:
                self._on_event(Reserved(self._tick, lease.id, pages))

    def attach(self, lease: Lease, limit: int) -> int:
        """Lengthen the run a lease stands on by what others have published; returns tokens gained. Cost: O(them).

        Raises:
            LeaseReleased: the lease has ended.
        """
        lease._require_live()
        start = lease._published
        node, position = self._tree.climb(lease._node, start)
        found = self._tree.match(node, position, bytes(lease._data[position * self._page_bytes :]))
        if limit >= 0 and found.num_pages * self.page_size + found.partial_tokens > limit:
            found = found.cut(limit, self.page_size)
        pages, tokens = found.num_pages - start, found.partial_tokens
        if pages < 0 or (pages == 0 and tokens <= lease.partial_tokens):
            return 0
        gained = pages * self.page_size + tokens - lease.partial_tokens
        num_freed = min(pages, len(lease._own))
        self._give_up(lease, num_freed)
        lease._published += pages
        lease._num_found += pages
        lease._num_others = max(lease._num_others, found.num_pages) if pages else lease._num_others
        lease._path = None
        lease.partial_tokens = tokens
        lease.num_matched += gained
        self._stand_on(lease, found.partial_page, found.partial_node)
        self.num_hit_tokens += gained
        self._tick += 1
        if self._on_event is not None:
            self._on_event(Attached(self._tick, lease.namespace, lease.id, gained, num_freed))
        return gained

    def commit(self, lease: Lease, num_tokens: int) -> int:
        """Publish the whole pages of the first `num_tokens` tokens; returns how many were duplicates. Cost: O(new tokens).

        Raises:
            ConfigError: more tokens than have pages. LeaseReleased: the lease has ended.
        """
        lease._require_live()
        start = lease._published
        whole = num_tokens // self.page_size
        limit = min(len(lease._data) // TOKEN_BYTES, (start + len(lease._own)) * self.page_size)
        if not 0 <= num_tokens <= limit:
            raise ConfigError("num_tokens", num_tokens, f"0 to {limit}, the tokens that have pages; extend() first")
        if whole <= start:
            return 0
        tail = bytes(lease._data[start * self._page_bytes : whole * self._page_bytes])
        fresh = lease._own[: whole - start]
        node, position = self._tree.climb(lease._node, start)
        self._tick += 1
        done = self._tree.insert(node, position, tail, fresh, self._tick, 1 if node is lease._node else 0)
        self._hand_over(lease, whole, fresh, done)
        if self._on_event is not None:
            self._on_event(Stored(self._tick, lease.namespace, lease.id, start, tail, done.num_duplicate, fresh))
        return done.num_duplicate

    def release(self, lease: Lease) -> None:
        """End a lease: settle where it ends, drop its lock, free what it has not published. Cost: O(edge) for a split.

        Raises:
            LeaseReleased: it had ended before.
        """
        lease._require_live()
        time_s = self._clock()
        del self.leases[lease.id]
        self._wide.pop(lease.id, None)
        self._tick += 1
        node = self._settle(lease, time_s)
        if lease._cursor is not None:
            lease._cursor._rest(node, lease._published)
        self._tree.unlock(node)
        own = lease._own
        if own:
            self._allocator.pool.free(own)
            self.num_leased -= len(own)
            node.account.num_leased -= len(own)
        lease._released = True
        if self._on_event is not None:
            num_tokens = len(lease._data) // TOKEN_BYTES
            self._on_event(Released(self._tick, lease.namespace, lease.id, num_tokens, len(own)))

    def path_pages(self, lease: Lease) -> array[int]:
        """The cached path's pages, then the lease's own. Cost: O(pages) where they have to be gathered anew.

        Raises:
            LeaseReleased: the lease has ended.
        """
        lease._require_live()
        if lease._path is None:
            node, position = self._tree.climb(lease._node, lease._published)
            lease._path = self._tree.path_pages(node, position) + lease._own
        return lease._path

    def narrow(self) -> None:
        """Split locked edges behind the last page their leases use, so that the rest is evicted in its turn.

        A match splits nothing, so a lease may lock more than it uses; before pages are taken that is put right. Once is
        enough: what a lease has locked does not grow. Cost: O(edge) for each lease since the last time.
        """
        for lease in self._wide.values():
            node, used = self._tree.climb(lease._node, lease._num_used)
            self._move_lock(lease, self._tree.end_at(node, used))
        self._wide.clear()

    # -- pins and events ----------------------------------------------------------------------------------------------

    def pin(self, end: PathEnd, num_tokens: int, owner: str) -> Pin:
        """Lock the path to `end`, which is what is cached of `num_tokens` tokens. Cost: as `pin_cost`, O(edge) for a split.

        Raises:
            PinError, PinBudgetExceeded: it is not possible.
        """
        self.pins.require(self.pin_cost(end, num_tokens, owner))
        node = self._tree.end_at(end.node, end.position)
        self._tree.lock(node)
        pin = self.pins.add(self, owner, node)
        self.tell(Pinned(self.next_tick(), pin.namespace, pin.id, owner, pin.num_pages))
        return pin

    def pin_cost(self, end: PathEnd, num_tokens: int, owner: str) -> PinCost:
        """What `pin` would take and leave. Cost: O(nodes of all leased and pinned paths)."""
        evictable = self._tree.num_pages - num_covered(cover([*self._ends(), end]))
        return self.pins.cost(owner, end, num_tokens, self.page_size, evictable)

    def unpin(self, pin: Pin) -> None:
        """End a pin. Cost: O(nodes of all pinned paths).

        Raises:
            PinReleased: it had ended before.
        """
        self.pins.drop(pin)
        self._tree.unlock(pin._node)
        self.tell(Unpinned(self.next_tick(), pin.namespace, pin.id, pin.owner, pin.num_pages))

    def next_tick(self) -> int:
        """The tick of one more action. Cost: O(1)."""
        self._tick += 1
        return self._tick

    def tell(self, event: Event) -> None:
        """Tell whoever listens of an action that is done. Cost: the listener's."""
        if self._on_event is not None:
            self._on_event(event)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _open(
        self,
        namespace: bytes,
        data: bytes | bytearray,
        found: Match,
        cursor: Cursor | None,
        limit: int,
        owner: str,
        tag: int,
        wishes: Retention | None,
    ) -> Lease:
        if limit >= 0 and found.num_pages * self.page_size + found.partial_tokens > limit:
            found = found.cut(limit, self.page_size)
        node = found.partial_node
        self._tree.lock(node)
        num_tokens = len(data) // TOKEN_BYTES
        sought = (min(limit, num_tokens) if limit >= 0 else num_tokens) // self.page_size
        lease = Lease(self, self._next, owner, namespace, data, found, cursor, tag, sought)
        lease._retention = wishes
        self._next += 1
        self.leases[lease.id] = lease
        self._note_width(lease)
        if cursor is not None:
            cursor._lease = lease
        self.num_lookups += 1
        self.num_lookup_tokens += num_tokens
        self.num_hit_tokens += lease.num_matched
        self._tick += 1
        if self._on_event is not None:
            self._on_event(Looked(self._tick, namespace, lease.id, owner, num_tokens, lease.num_matched))
        return lease

    def _give_up(self, lease: Lease, num_pages: int) -> None:
        """Free the first of a lease's own pages: their place is taken."""
        if num_pages:
            self._allocator.pool.free(lease._own[:num_pages])
            del lease._own[:num_pages]
            self.num_leased -= num_pages
            lease._node.account.num_leased -= num_pages

    def _hand_over(self, lease: Lease, whole: int, fresh: array[int], done: Insertion) -> None:
        """The tree has taken the first pages of its own, `fresh`, or has them already: those are freed and left out."""
        num_new = len(fresh)
        del lease._own[:num_new]
        if done.num_duplicate:
            self._allocator.pool.free(fresh[: done.num_duplicate])
            del fresh[: done.num_duplicate]
            lease._path = None
            lease._num_others = max(lease._num_others, whole - num_new + done.num_duplicate)
        self.num_leased -= num_new
        done.node.account.num_leased -= num_new
        lease._published = whole
        lease._partial_page, lease.partial_tokens = -1, 0
        self._move_lock(lease, done.node)
        self._wide.pop(lease.id, None)

    def _settle(self, lease: Lease, time_s: float) -> Node:
        """The node where a lease ends, split there, used now, and locked by it; a root where it has published nothing."""
        node, position = self._tree.climb(lease._node, lease._published)
        if node.parent is not None:
            node = self._tree.settle(node, position, self._tick, time_s)
            if self._allocator.policy.learns:
                node.mark = self._allocator.policy.ended(lease._ended(self._tick, time_s))
        self._move_lock(lease, node)
        if lease._retention is not None and node.parent is not None:
            self._allocator.use_levels()
            lease._retention.apply(self._tree, node, lease._num_others)
        return node

    def _stand_on(self, lease: Lease, partial_page: int, node: Node) -> None:
        """Copy from that page, or from none, and lock `node` for it."""
        lease._partial_page = partial_page
        self._move_lock(lease, node)
        self._note_width(lease)

    def _note_width(self, lease: Lease) -> None:
        """Remember whether a lease locks more of an edge than it uses."""
        if lease._num_used < lease._node.end:
            self._wide[lease.id] = lease
        else:
            self._wide.pop(lease.id, None)

    def _move_lock(self, lease: Lease, node: Node) -> None:
        if node is not lease._node:
            self._tree.lock(node)
            self._tree.unlock(lease._node)
            lease._node = node

    def _allocate_for(self, lease: Lease, num_pages: int) -> array[int]:
        """Pages for a lease. Where they cannot be had otherwise, it gives up the page it would copy a few tokens from."""
        try:
            return self._allocate(num_pages, lease._node.account)
        except (PoolExhausted, QuotaExceeded):
            if lease._partial_page < 0:
                raise
        page, node = lease._partial_page, lease._node
        self._stand_on(lease, -1, self._tree.climb(node, lease._published)[0])
        try:
            pages = self._allocate(num_pages, lease._node.account)
        except (PoolExhausted, QuotaExceeded):
            self._stand_on(lease, page, node)
            raise
        lease.num_matched -= lease.partial_tokens
        lease.partial_tokens = 0
        return pages

    def _allocate(self, num_pages: int, account: Account) -> array[int]:
        """Free pages, or else the policy's victims; locked pages that no lease uses are unlocked first."""
        if self._allocator.quotas is not None:
            return self._allocate_within(self._allocator.quotas, num_pages, account)
        missing = num_pages - self._allocator.pool.num_free
        if missing > 0:
            if missing > self._tree.num_evictable:
                evictable = self._tree.num_pages - num_covered(cover(self._ends()))
                self._allocator.require(num_pages, evictable, self.num_leased, self.pins.num_pages)
            self.narrow()
        return self._allocator.allocate(num_pages)

    def _allocate_within(self, quotas: Quotas, num_pages: int, account: Account) -> array[int]:
        """As `_allocate`, where namespaces have quotas or reservations: its own pages first, where it has too many."""
        pool = self._allocator.pool
        claim = quotas.claim(account, num_pages, pool.num_free)
        if claim.over or claim.missing:
            if not claim.fits(quotas.room(self._tree, account)):
                room = quotas.room(self._tree, account, by_namespace(cover(self._ends())))
                quotas.refuse(account, claim, room, pool.num_free, self.num_leased, self.pins.num_pages)
            self.narrow()
            self._allocator.evict_of(claim.over, account)
            self._allocator.evict_for(num_pages - pool.num_free, account)
        return pool.allocate(num_pages)

    def _ends(self) -> list[PathEnd]:
        """Where the pages that leases and pins use end: what would be locked after `narrow`. Cost: O(leases + pins)."""
        ends = [PathEnd(*self._tree.climb(lease._node, lease._num_used)) for lease in self.leases.values()]
        ends.extend(self.pins.ends())
        return ends

    def _evicted(self, account: Account, start: int, pages: array[int], last_tick: int) -> None:
        self.num_evicted += len(pages)
        self._tick += 1
        if self._on_event is not None:
            self._on_event(Evicted(self._tick, account.key, start, pages, last_tick))
