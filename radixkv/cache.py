"""PrefixCache: prompts in, leases on cached pages out.

    acquire(tokens) ─▶ Lease          longest cached prefix, its end locked
       lease.extend(more)             pages for what is not cached: free ones first, then the policy's victims
       lease.commit(n)                KV of the first n tokens is written: whole pages are published at once
       lease.release()                lock dropped, unpublished pages freed

All calls may come from any thread; one lock serialises them. What leases do to pages and tree, and which page is whose, is
in leasing.py.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from threading import RLock
from typing import SupportsIndex, final

import numpy as np
import numpy.typing as npt

from radixkv.allocator import Allocator
from radixkv.check import check_cache
from radixkv.cover import PathEnd
from radixkv.drawing import draw
from radixkv.errors import ConfigError, ForeignLease, NamespaceError
from radixkv.events import EventSink, Removed
from radixkv.lease import Cursor, Lease
from radixkv.leasing import Leasing
from radixkv.match import Probe, Removal
from radixkv.namespace import Namespace, namespace_key
from radixkv.node import Account, Node
from radixkv.pins import Pin, PinCost, Pins
from radixkv.prefix import TOKEN_BYTES
from radixkv.quota import Quota, Quotas, Usage
from radixkv.retention import Retain, Retention
from radixkv.stats import CacheStats, stats_of
from radixkv.tokens import TokenInput, as_count, token_bytes

__all__ = ["CacheStats", "PrefixCache"]


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
        on_event: called with every event, in order, inside the lock. It must not raise: what it is told of is done by
            then, and whoever asked for it would not get the result.
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
        self._allocator = Allocator(as_count("num_pages", num_pages), self.page_size, policy, clock)
        self._tree = self._allocator.tree
        per_owner = None if pin_budget_per_owner is None else as_count("pin_budget_per_owner", pin_budget_per_owner)
        budget = as_count("pin_budget_pages", pin_budget_pages)
        self._pins = Pins(budget, per_owner, self._allocator.pool.num_pages)
        self._allocator.num_pinnable = budget
        self._lock = RLock()
        self._leasing = Leasing(self._allocator, self._pins, self._lock, on_event, clock)

    # -- look up ------------------------------------------------------------------------------------------------------

    def acquire(
        self,
        tokens: TokenInput | Cursor,
        namespace: str | Namespace = "",
        *,
        limit: SupportsIndex | None = None,
        owner: str = "",
        tag: SupportsIndex = 0,
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
            tag: an opaque small integer about the request ("the session will continue"), 0 to 15, which the policy
                `auto` may learn from; others ignore it.
            retention: how much to keep which of its tokens; `Lease.retain` says or changes it later.

        Returns:
            Lease, to be released (it is a context manager).

        Raises:
            TokenError: unusable ids. NamespaceError: unusable namespace. ForeignLease: another cache's cursor.
            CursorBusy: a lease over the cursor is live. ConfigError: a limit or tag that is no integer, or an unusable
                retention.
        """
        cursor = tokens if isinstance(tokens, Cursor) else None
        data = b"" if cursor is not None else token_bytes(tokens)
        most = -1 if limit is None else max(as_count("limit", limit), 0)
        label = as_count("tag", tag)
        wishes = Retention(retention) if retention else None
        with self._lock:
            if cursor is None:
                return self._leasing.open(self.namespace_key(namespace), data, most, owner, label, wishes)
            if cursor._leasing is not self._leasing:
                raise ForeignLease("this cursor")
            cursor._require_idle()
            return self._leasing.open_cursor(cursor, most, owner, label, wishes)

    def match(self, tokens: TokenInput, namespace: str | Namespace = "") -> int:
        """How many leading tokens are cached; touches nothing, not even recency. Cost: O(T) token compares."""
        return self.probe(tokens, namespace).num_matched

    def probe(self, tokens: TokenInput, namespace: str | Namespace = "") -> Probe:
        """As `match`, and how much of it a lease would not take from what can be evicted: the part locked already.

        For a scheduler that asks what a request would need before it starts. Touches nothing. Cost: O(T) token compares.
        """
        data = token_bytes(tokens)
        with self._lock:
            root = self._tree.roots.get(self.namespace_key(namespace))
            if root is None:
                return Probe(0, 0)
            found = self._tree.match(root, 0, data)
            node = found.partial_node
            while node.guard_count == 0 and node.parent is not None:
                node = node.parent
            num_matched = found.num_pages * self.page_size + found.partial_tokens
            return Probe(num_matched, min(node.end * self.page_size, num_matched))

    def cursor(self, namespace: str | Namespace = "", tokens: TokenInput = ()) -> Cursor:
        """A handle on a growing sequence, whose later look-ups and commits cost its new tokens only."""
        data = token_bytes(tokens)
        with self._lock:
            key = self.namespace_key(namespace)
            root = Node(Account(key), None, 0, bytearray(), array("i"))
            root.alive = False  # not in the tree: the first use climbs to the namespace's root, if there is one then
            return Cursor(self._leasing, key, bytearray(data), root, 0)

    # -- take away ----------------------------------------------------------------------------------------------------

    def evict(self, num_pages: SupportsIndex) -> int:
        """Let the policy free up to `num_pages` pages now; returns how many it did. Cost: O(log n) a leaf."""
        wanted = as_count("num_pages", num_pages)
        with self._lock:
            self._leasing.narrow()
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
            self._leasing.narrow()
            found = self._tree.match(root, 0, data[:cut])
            if found.num_pages * self._page_bytes < cut:
                return Removal(array("i"), 0)
            return self._remove(found.node, found.num_pages, data[cut:])

    def _remove(self, node: Node, position: int, probe: bytes) -> Removal:
        namespace = node.namespace
        removal = self._tree.remove(node, position, probe)
        self._allocator.pool.free(removal.pages)
        self._leasing.tell(Removed(self._leasing.next_tick(), namespace, removal.pages, removal.num_locked))
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
            self._leasing.narrow()
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
            return self._leasing.pin(end, len(data) // TOKEN_BYTES, owner)

    def pin_cost(self, tokens: TokenInput, namespace: str | Namespace = "", *, owner: str) -> PinCost:
        """What `pin` would do, take and leave, and whether it may; changes nothing. Cost: as `pin`, without the split."""
        data = token_bytes(tokens)
        with self._lock:
            return self._leasing.pin_cost(self._pin_end(data, namespace), len(data) // TOKEN_BYTES, owner)

    def _pin_end(self, data: bytes, namespace: str | Namespace) -> PathEnd:
        """Where the cached whole pages of `data` end; in a node of its own where nothing is cached."""
        key = self.namespace_key(namespace)
        root = self._tree.roots.get(key)
        if root is None:
            return PathEnd(Node(Account(key), None, 0, b"", array("i")), 0)
        found = self._tree.match(root, 0, data)
        return PathEnd(found.node, found.num_pages)

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
                self._leasing.narrow()
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
            return stats_of(self._allocator, self._leasing)

    def leases(self) -> Sequence[Lease]:
        """Every lease not yet released, oldest first: who forgot one is named in `lease.owner`."""
        with self._lock:
            return tuple(self._leasing.leases.values())

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
            check_cache(self._allocator, self._leasing)

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
