"""PrefixCache: prompts in, leases on cached pages out.

    acquire(tokens) ─▶ Lease          longest cached prefix, its end locked
       lease.extend(more)             pages for what is not cached: free ones first, then the policy's victims
       lease.commit(n)                KV of the first n tokens is written: whole pages are published at once
       lease.release()                lock dropped, unpublished pages freed

    one lease over its sequence, in pages           owner
    [0, published)            path pages            the tree, locked by this lease
    [published, +len(own))    own pages             this lease
    the rest                  no page yet           -

Every page has exactly one owner at any time. A call that raises has changed nothing: pages are allocated before
anything moves. All calls may come from any thread; one lock serialises them.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from threading import RLock
from typing import NamedTuple, SupportsIndex, final

import numpy as np
import numpy.typing as npt

from radixkv.allocator import Allocator
from radixkv.check import check_cache
from radixkv.cover import PathEnd, by_namespace, cover, num_covered
from radixkv.drawing import draw
from radixkv.errors import ConfigError, ForeignLease, NamespaceError
from radixkv.events import EventSink, Evicted, Looked, Pinned, Released, Removed, Reserved, Stored, Unpinned
from radixkv.lease import Cursor, Lease
from radixkv.namespace import Namespace, namespace_key
from radixkv.node import Account, Node
from radixkv.pins import Pin, PinCost, Pins
from radixkv.policies import Ended
from radixkv.prefix import TOKEN_BYTES
from radixkv.quota import Quota, Quotas, Usage
from radixkv.retention import Retain, Retention
from radixkv.tokens import TokenInput, as_count, token_bytes
from radixkv.tree import Match, Removal

__all__ = ["CacheStats", "PrefixCache"]


class CacheStats(NamedTuple):
    """Where every page is, and what the look-ups found.

    free + evictable + locked + leased = num_pages; pinned pages are locked ones.
    """

    num_pages: int
    page_size: int
    num_free: int
    num_evictable: int
    num_locked: int
    num_leased: int
    num_nodes: int
    num_leases: int
    num_namespaces: int
    lookups: int
    lookup_tokens: int
    hit_tokens: int
    evicted_pages: int
    num_pinned: int

    @property
    def hit_rate(self) -> float:
        """Matched tokens / looked-up tokens."""
        return self.hit_tokens / self.lookup_tokens if self.lookup_tokens else 0.0


@final
class PrefixCache:
    """A radix tree of token prefixes over a pool of pages.

    Args:
        num_pages: pages in the pool, >= 1.
        page_size: tokens in a page, >= 1.
        policy: the eviction policy's name, one of `POLICIES`; `set_policy` changes it later.
        fingerprint: of what computes the KV (weights, tokenizer, dtype, layout); part of every namespace.
        pin_budget_pages: pages that pins may hold, at most half of all; 0: nothing can be pinned.
        pin_budget_per_owner: pages that the pins of one owner may hold; None: no limit of its own.
        on_event: called with every event, in order, inside the lock.
        clock: seconds, from any start; recency never depends on it, durations do.

    Thread safety: any thread may call anything; calls are serialised by one lock and never wait for each other's work.

    >>> cache = PrefixCache(num_pages=8, page_size=2)
    >>> with cache.acquire([1, 2, 3, 4, 5]) as lease:
    ...     lease.extend()
    ...     lease.commit(5)
    0
    >>> cache.match([1, 2, 3, 9])
    3
    """

    def __init__(
        self,
        num_pages: SupportsIndex,
        page_size: SupportsIndex = 16,
        *,
        policy: str = "lru",
        fingerprint: str = "",
        pin_budget_pages: SupportsIndex = 0,
        pin_budget_per_owner: SupportsIndex | None = None,
        on_event: EventSink | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.page_size = as_count("page_size", page_size)
        if self.page_size < 1:
            raise ConfigError("page_size", self.page_size, "at least 1")
        self.fingerprint = fingerprint
        self._page_bytes = self.page_size * TOKEN_BYTES
        self._allocator = Allocator(as_count("num_pages", num_pages), self.page_size, policy, self._evicted, clock)
        self._tree = self._allocator.tree
        per_owner = None if pin_budget_per_owner is None else as_count("pin_budget_per_owner", pin_budget_per_owner)
        budget = as_count("pin_budget_pages", pin_budget_pages)
        self._pins = Pins(budget, per_owner, self._allocator.pool.num_pages)
        self._leases: dict[int, Lease] = {}
        self._wide: dict[int, Lease] = {}  # those whose match ended inside an edge: they lock more of it than they use
        self._on_event = on_event
        self._clock = clock
        self._lock = RLock()
        self._tick = 0
        self._next_lease = 1
        self._num_leased = 0
        self._lookups = self._lookup_tokens = self._hit_tokens = self._evicted_pages = 0

    # -- look up ------------------------------------------------------------------------------------------------------

    def acquire(
        self,
        tokens: TokenInput | Cursor,
        namespace: str | Namespace = "",
        *,
        limit: SupportsIndex | None = None,
        owner: str = "",
        tag: int = 0,
        retention: Iterable[Retain] = (),
    ) -> Lease:
        """Find the longest cached prefix of `tokens` and lease it.

        Cost: O(T) token compares, no device work; O(new tokens) for a `Cursor`.
        Mutates: a lock on the node where the match ends; never the tree's structure.

        Args:
            tokens: [T] token ids, T >= 0, or a cursor of this cache.
            namespace: a tenant's salt, or a `Namespace`; a cursor brings its own.
            limit: match at most so many tokens; an engine passes T - 1, since the last token's logits are needed.
            owner: whom to name when the lease is asked for by `leases()`.
            tag: an opaque small integer about the request ("the session will continue"), which the policy `auto` may
                learn from; others ignore it.
            retention: how much to keep which of its tokens; `Lease.retain` says or changes it later.

        Returns:
            Lease, to be released (it is a context manager).

        Raises:
            TokenError: unusable ids. NamespaceError: unusable namespace. ForeignLease: another cache's cursor.
            CursorBusy: a lease over the cursor is live. ConfigError: a limit that is no integer, an unusable retention.
        """
        cursor = tokens if isinstance(tokens, Cursor) else None
        data = b"" if cursor is not None else token_bytes(tokens)
        most = -1 if limit is None else max(as_count("limit", limit), 0)
        wishes = Retention(retention) if retention else None
        with self._lock:
            if cursor is not None:
                if cursor._cache is not self:
                    raise ForeignLease("this cursor")
                cursor._require_idle()
                key, num_tokens = cursor._namespace, len(cursor._data) // TOKEN_BYTES
                node, position = self._tree.climb(cursor._node, cursor._position)
                found = self._tree.match(node, position, bytes(cursor._data[position * self._page_bytes :]))
            else:
                key, num_tokens = self.namespace_key(namespace), len(data) // TOKEN_BYTES
                found = self._tree.match(self._tree.root(key), 0, data)
            if limit is not None and found.num_pages * self.page_size + found.partial_tokens > most:
                found = self._cut(found, most)
            self._tree.lock(found.partial_node)
            lease_id, self._next_lease = self._next_lease, self._next_lease + 1
            lease = Lease(self, lease_id, owner, key, data if cursor is None else cursor._data, found, cursor, tag)
            if wishes is not None:
                lease._retention = wishes
            self._leases[lease_id] = lease
            if found.num_pages + (found.partial_page >= 0) < found.partial_node.end:
                self._wide[lease_id] = lease
            if cursor is not None:
                cursor._lease = lease
            self._lookups += 1
            self._lookup_tokens += num_tokens
            self._hit_tokens += lease.num_matched
            self._tick += 1
            if self._on_event is not None:
                self._on_event(Looked(self._tick, key, lease_id, owner, num_tokens, lease.num_matched))
            return lease

    def match(self, tokens: TokenInput, namespace: str | Namespace = "") -> int:
        """How many leading tokens are cached; touches nothing, not even recency. Cost: O(T) token compares."""
        data = token_bytes(tokens)
        with self._lock:
            root = self._tree.roots.get(self.namespace_key(namespace))
            if root is None:
                return 0
            found = self._tree.match(root, 0, data)
            return found.num_pages * self.page_size + found.partial_tokens

    def cursor(self, namespace: str | Namespace = "", tokens: TokenInput = ()) -> Cursor:
        """A handle on a growing sequence, whose later look-ups and commits cost its new tokens only."""
        data = token_bytes(tokens)
        with self._lock:
            key = self.namespace_key(namespace)
            root = Node(Account(key), None, 0, bytearray(), array("i"))
            root.alive = False  # not in the tree: the first use climbs to the namespace's root, if there is one then
            return Cursor(self, key, bytearray(data), root, 0)

    def _cut(self, found: Match, limit: int) -> Match:
        """Shorten a match to `limit` tokens."""
        whole, tokens = divmod(limit, self.page_size)
        if found.num_pages <= whole:
            tokens = min(tokens, found.partial_tokens) if found.num_pages == whole else found.partial_tokens
            page = found.partial_page if tokens else -1
            return Match(found.node, found.num_pages, page, tokens, found.partial_node if tokens else found.node)
        node, _ = self._tree.climb(found.node, whole + 1)  # holds the page with index `whole`
        if tokens:
            return Match(node, whole, node.pages[whole - node.start], tokens, node)
        node, _ = self._tree.climb(node, whole)
        return Match(node, whole, -1, 0, node)

    # -- what leases do (called through Lease) ------------------------------------------------------------------------

    def _extend(self, lease: Lease, data: bytes) -> None:
        with self._lock:
            lease._require_live()
            num_tokens = (len(lease._data) + len(data)) // TOKEN_BYTES
            needed = -(-num_tokens // self.page_size) - lease._published - len(lease._own)
            pages = self._allocate(needed, lease._node.account) if needed > 0 else None
            if data:
                if not isinstance(lease._data, bytearray):
                    lease._data = bytearray(lease._data)
                lease._data += data
            if pages is not None:
                lease._own += pages
                if lease._path is not None:
                    lease._path = lease._path + pages  # a new array: whoever views the old one keeps it
                self._num_leased += needed
                lease._node.account.num_leased += needed
                self._tick += 1
                if self._on_event is not None:
                    self._on_event(Reserved(self._tick, lease.id, pages))

    def _allocate(self, num_pages: int, account: Account) -> array[int]:
        """Free pages, or else the policy's victims; locked pages that no lease uses are unlocked first."""
        if self._allocator.quotas is not None:
            return self._allocate_within(self._allocator.quotas, num_pages, account)
        missing = num_pages - self._allocator.pool.num_free
        if missing > 0:
            if missing > self._tree.num_evictable:
                evictable = self._tree.num_pages - num_covered(cover(self._ends()))
                self._allocator.require(num_pages, evictable, self._num_leased)
            self._narrow()
        return self._allocator.allocate(num_pages)

    def _allocate_within(self, quotas: Quotas, num_pages: int, account: Account) -> array[int]:
        """As `_allocate`, where namespaces have quotas or reservations: its own pages first, where it has too many."""
        pool = self._allocator.pool
        claim = quotas.claim(account, num_pages, pool.num_free)
        if claim.over or claim.missing:
            if not claim.fits(quotas.room(self._tree, account)):
                room = quotas.room(self._tree, account, by_namespace(cover(self._ends())))
                quotas.refuse(account, claim, room, pool.num_free, self._num_leased)
            self._narrow()
            self._allocator.evict_of(claim.over, account)
            self._allocator.evict_for(num_pages - pool.num_free, account)
        return pool.allocate(num_pages)

    def _narrow(self) -> None:
        """Split locked edges behind the last page their leases use, so that the rest is evicted in its turn.

        A match splits nothing, so a lease may lock more than it uses; before pages are taken that is put right. Once is
        enough: what a lease has locked does not grow. Cost: O(edge) for each lease since the last time.
        """
        for lease in self._wide.values():
            node, used = self._tree.climb(lease._node, lease._num_used)
            self._move_lock(lease, self._tree.end_at(node, used))
        self._wide.clear()

    def _ends(self) -> list[PathEnd]:
        """Where the pages that leases and pins use end: what would be locked after `_narrow`. Cost: O(leases + pins)."""
        ends = [PathEnd(*self._tree.climb(lease._node, lease._num_used)) for lease in self._leases.values()]
        ends.extend(self._pins.ends())
        return ends

    def _evicted(self, account: Account, start: int, pages: array[int], last_tick: int) -> None:
        self._evicted_pages += len(pages)
        self._tick += 1
        if self._on_event is not None:
            self._on_event(Evicted(self._tick, account.key, start, pages, last_tick))

    def _commit(self, lease: Lease, num_tokens: int) -> int:
        with self._lock:
            lease._require_live()
            total = len(lease._data) // TOKEN_BYTES
            whole = num_tokens // self.page_size
            num_new = whole - lease._published
            limit = min(total, (lease._published + len(lease._own)) * self.page_size)
            if not 0 <= num_tokens <= limit:
                raise ConfigError("num_tokens", num_tokens, f"0 to {limit}, the tokens that have pages; extend() first")
            if num_new <= 0:
                return 0
            start = lease._published
            tail = bytes(lease._data[start * self._page_bytes : whole * self._page_bytes])
            node, position = self._tree.climb(lease._node, start)
            self._tick += 1
            own_locks = 1 if node is lease._node else 0
            fresh = lease._own[:num_new]
            done = self._tree.insert(node, position, tail, fresh, self._tick, own_locks)
            del lease._own[:num_new]
            if done.num_duplicate:
                self._allocator.pool.free(fresh[: done.num_duplicate])
                del fresh[: done.num_duplicate]
                lease._path = None
            self._num_leased -= num_new
            done.node.account.num_leased -= num_new
            lease._published = whole
            lease._partial_page, lease.partial_tokens = -1, 0
            self._move_lock(lease, done.node)
            self._wide.pop(lease.id, None)
            if self._on_event is not None:
                event = Stored(self._tick, lease.namespace, lease.id, start, tail, done.num_duplicate, fresh)
                self._on_event(event)
            return done.num_duplicate

    def _move_lock(self, lease: Lease, node: Node) -> None:
        if node is not lease._node:
            self._tree.lock(node)
            self._tree.unlock(lease._node)
            lease._node = node

    def _release(self, lease: Lease) -> None:
        with self._lock:
            lease._require_live()
            del self._leases[lease.id]
            self._wide.pop(lease.id, None)
            self._tick += 1
            node, position = self._tree.climb(lease._node, lease._published)
            if node.parent is not None:
                time_s = self._clock()
                node = self._tree.settle(node, position, self._tick, time_s)
                if self._allocator.policy.learns:
                    node.mark = self._allocator.policy.ended(self._ended(lease, time_s))
            self._move_lock(lease, node)
            if lease._retention is not None and node.parent is not None:
                self._allocator.use_levels()
                lease._retention.apply(self._tree, node, lease._num_found)
            if lease._cursor is not None:
                lease._cursor._rest(node, lease._published)
            self._tree.unlock(node)
            own = lease._own
            if own:
                self._allocator.pool.free(own)
                self._num_leased -= len(own)
                node.account.num_leased -= len(own)
            lease._released = True
            if self._on_event is not None:
                num_tokens = len(lease._data) // TOKEN_BYTES
                self._on_event(Released(self._tick, lease.namespace, lease.id, num_tokens, len(own)))

    def _ended(self, lease: Lease, time_s: float) -> Ended:
        return Ended(
            self._tick,
            time_s,
            lease.namespace,
            lease._tag,
            lease._data,
            self.page_size,
            lease._published,
            lease._num_found,
            lease._continued,
        )

    def _path_pages(self, lease: Lease) -> array[int]:
        with self._lock:
            lease._require_live()
            if lease._path is None:
                node, position = self._tree.climb(lease._node, lease._published)
                lease._path = self._tree.path_pages(node, position) + lease._own
            return lease._path

    # -- take away ----------------------------------------------------------------------------------------------------

    def evict(self, num_pages: SupportsIndex) -> int:
        """Let the policy free up to `num_pages` pages now; returns how many it did. Cost: O(log n) a leaf."""
        wanted = as_count("num_pages", num_pages)
        with self._lock:
            self._narrow()
            return self._allocator.evict(min(wanted, self._tree.num_evictable))

    def remove(self, tokens: TokenInput = (), namespace: str | Namespace = "") -> Removal:
        """Forget every cached page that continues `tokens`; what leases hold stays and is counted.

        Where `tokens` ends inside a page, the pages that begin with its last tokens go. Cost: O(subtree).
        """
        data = token_bytes(tokens)
        cut = len(data) - len(data) % self._page_bytes
        with self._lock:
            root = self._tree.roots.get(self.namespace_key(namespace))
            if root is None:
                return Removal(array("i"), 0)
            self._narrow()
            found = self._tree.match(root, 0, data[:cut])
            if found.num_pages * self._page_bytes < cut:
                return Removal(array("i"), 0)
            return self._remove(found.node, found.num_pages, data[cut:])

    def _remove(self, node: Node, position: int, probe: bytes) -> Removal:
        namespace = node.namespace
        removal = self._tree.remove(node, position, probe)
        self._allocator.pool.free(removal.pages)
        self._tick += 1
        if self._on_event is not None:
            self._on_event(Removed(self._tick, namespace, removal.pages, removal.num_locked))
        return removal

    def set_policy(self, policy: str) -> None:
        """Evict by another policy from now on; what is cached stays. Cost: O(n log n) of the evictable leaves.

        Raises:
            ConfigError: no such policy.
        """
        with self._lock:
            self._allocator.set_policy(policy)

    def flush(self) -> int:
        """Forget everything in every namespace; returns how many pages stay because leases hold them."""
        with self._lock:
            self._narrow()
            for root in list(self._tree.roots.values()):
                self._remove(root, 0, b"")
            return self._tree.num_pages

    # -- pins and quotas ----------------------------------------------------------------------------------------------

    def pin(self, tokens: TokenInput, namespace: str | Namespace = "", *, owner: str) -> Pin:
        """Keep the cached whole pages of `tokens` until the pin is released, whatever else happens.

        Cost: O(T) token compares, O(nodes of all pinned paths), O(edge) for a split.

        Raises:
            PinError: the cache was made without a pin budget, or nothing of `tokens` is cached.
            PinBudgetExceeded: the budget, or the owner's, has too few pages left; nothing has changed then.
        """
        data = token_bytes(tokens)
        with self._lock:
            end = self._pin_end(data, namespace)
            self._pins.require(self._pin_cost(data, end, owner))
            node = self._tree.end_at(end.node, end.position)
            self._tree.lock(node)
            pin = self._pins.add(self, owner, node)
            self._tick += 1
            if self._on_event is not None:
                self._on_event(Pinned(self._tick, pin.namespace, pin.id, owner, pin.num_pages))
            return pin

    def pin_cost(self, tokens: TokenInput, namespace: str | Namespace = "", *, owner: str) -> PinCost:
        """What `pin` would do, take and leave, and whether it may; changes nothing. Cost: as `pin`, without the split."""
        data = token_bytes(tokens)
        with self._lock:
            return self._pin_cost(data, self._pin_end(data, namespace), owner)

    def _pin_end(self, data: bytes, namespace: str | Namespace) -> PathEnd:
        """Where the cached whole pages of `data` end; in a node of its own where nothing is cached."""
        key = self.namespace_key(namespace)
        root = self._tree.roots.get(key)
        if root is None:
            return PathEnd(Node(Account(key), None, 0, b"", array("i")), 0)
        found = self._tree.match(root, 0, data)
        return PathEnd(found.node, found.num_pages)

    def _pin_cost(self, data: bytes, end: PathEnd, owner: str) -> PinCost:
        evictable = self._tree.num_pages - num_covered(cover([*self._ends(), end]))
        return self._pins.cost(owner, end, len(data) // TOKEN_BYTES, self.page_size, evictable)

    def _unpin(self, pin: Pin) -> None:
        with self._lock:
            self._pins.drop(pin)
            self._tree.unlock(pin._node)
            self._tick += 1
            if self._on_event is not None:
                self._on_event(Unpinned(self._tick, pin.namespace, pin.id, pin.owner, pin.num_pages))

    def pins(self) -> Sequence[Pin]:
        """Every live pin, oldest first."""
        with self._lock:
            return self._pins.all()

    def set_quota(
        self,
        namespace: str | Namespace,
        max_pages: SupportsIndex | None = None,
        reserved_pages: SupportsIndex = 0,
    ) -> int:
        """Limit what a namespace may hold, and protect some of it from others; neither: forget its quota.

        What it holds beyond `max_pages` is evicted at once, as far as nothing locks it. Cost: O(its nodes).

        Args:
            namespace: whose.
            max_pages: pages of its tree and its leases; an allocation beyond evicts its own first. None: no limit.
            reserved_pages: what it has cached is evicted by others' requests down to so many pages, and no further.
                Reserved pages that it does not use may be used by anybody.

        Returns:
            Pages evicted.

        Raises:
            ConfigError: not such numbers, or all reservations together leave no page.
        """
        quota = Quota(
            namespace,
            None if max_pages is None else as_count("max_pages", max_pages),
            as_count("reserved_pages", reserved_pages),
        )
        with self._lock:
            key = self.namespace_key(namespace)
            self._allocator.set_quota(key, quota)
            root, quotas = self._tree.roots.get(key), self._allocator.quotas
            if root is None or quotas is None:
                return 0
            over = quotas.claim(root.account, 0, 0).over
            if over:
                self._narrow()
            return self._allocator.evict_of(over, root.account) if over else 0

    def quotas(self) -> Sequence[Quota]:
        """Every quota, oldest first."""
        with self._lock:
            return self._allocator.quotas.all() if self._allocator.quotas is not None else ()

    def usage(self, namespace: str | Namespace = "") -> Usage:
        """What a namespace holds and may hold. Cost: O(1)."""
        with self._lock:
            key = self.namespace_key(namespace)
            root = self._tree.roots.get(key)
            quotas = self._allocator.quotas or Quotas(0)
            return quotas.usage(key, root.account if root is not None else None)

    # -- look at ------------------------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Counts, all exact. Cost: O(1)."""
        with self._lock:
            return CacheStats(
                num_pages=self._allocator.pool.num_pages,
                page_size=self.page_size,
                num_free=self._allocator.pool.num_free,
                num_evictable=self._tree.num_evictable,
                num_locked=self._tree.num_pages - self._tree.num_evictable,
                num_leased=self._num_leased,
                num_nodes=self._tree.num_nodes,
                num_leases=len(self._leases),
                num_namespaces=len(self._tree.roots),
                lookups=self._lookups,
                lookup_tokens=self._lookup_tokens,
                hit_tokens=self._hit_tokens,
                evicted_pages=self._evicted_pages,
                num_pinned=self._pins.num_pages,
            )

    def leases(self) -> Sequence[Lease]:
        """Every lease not yet released, oldest first: who forgot one is named in `lease.owner`."""
        with self._lock:
            return tuple(self._leases.values())

    def generation(self, page: int) -> int:
        """How often `page` was freed since anybody first asked; a reader compares before and after a copy."""
        with self._lock:
            return self._allocator.pool.generation(page)

    def generations(self, pages: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """[n] generations of [n] pages. Cost: O(n)."""
        with self._lock:
            return self._allocator.pool.generations(pages)

    def show(self, *, max_nodes: int = 200) -> str:
        """Draw the tree of every namespace."""
        with self._lock:
            return draw(self._tree, max_nodes)

    def check(self) -> None:
        """Recount every invariant of docs/invariants.md. Cost: O(pages + nodes).

        Raises:
            InvariantError: one is broken.
        """
        with self._lock:
            check_cache(self._allocator, tuple(self._leases.values()), self._num_leased, self._pins)

    def namespace_key(self, namespace: str | Namespace) -> bytes:
        """The key of a namespace here: text is a salt beside this cache's own fingerprint.

        Raises:
            NamespaceError: unusable.
        """
        if isinstance(namespace, str):
            return namespace_key(namespace, self.fingerprint)
        if isinstance(namespace, Namespace):
            return namespace.key
        raise NamespaceError(namespace, "expected text or a Namespace")
