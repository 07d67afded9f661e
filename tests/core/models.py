"""Models too simple to be wrong, and the real cache driven beside them.

    CacheModel   a dict from each page-aligned prefix (namespace included) to its page, and a tick for each
    Replayer     which pages are free, leased, in the tree: from the events alone
    World        one real PrefixCache, one CacheModel, one Replayer: every operation goes to all, every answer is compared

The model shares no code and no idea with the tree: it has no nodes, no edges, no splits, no locks, no counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from radixkv.cache import PrefixCache
from radixkv.errors import ConfigError, CursorBusy, LeaseReleased, PoolExhausted
from radixkv.events import Attached, Evicted, Looked, Released, Removed, Reserved, Stored
from radixkv.lease import Cursor, Lease
from radixkv.namespace import Namespace
from radixkv.tree import RadixTree

Ids = tuple[int, ...]
Key = tuple[bytes, Ids]  # namespace key, page-aligned prefix

NAMESPACES = ("", "tenant-b", Namespace("", "other weights"))


def namespace_key(namespace: str | Namespace) -> bytes:
    return namespace.key if isinstance(namespace, Namespace) else Namespace(namespace, "").key


def common(left: Ids, right: Ids) -> int:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count


def raised(kind: type[Exception], call: Callable[..., object], *args: object):
    """The error of this kind that the call raises (pytest.raises fails with what no `except Exception` sees)."""
    try:
        call(*args)
    except kind as error:
        return error
    raise AssertionError(f"{call} did not raise {kind.__name__}")


def resident(cache: PrefixCache) -> dict[Key, int]:
    """What the real tree holds, as the model would write it: every page-aligned prefix and its page."""
    size = cache.page_size
    found: dict[Key, int] = {}
    for name, root in cache._tree.roots.items():
        stack = [(root, ())]
        while stack:
            node, above = stack.pop()
            ids = above + tuple(memoryview(bytes(node.key)).cast("i").tolist())
            for index, page in enumerate(node.pages):
                found[name, ids[: len(above) + (index + 1) * size]] = page
            stack.extend((child, ids) for child in (node.children or {}).values())
    return found


def snapshot(cache: PrefixCache) -> tuple[object, ...]:
    """All that a call which raises must leave as it was."""
    return (
        cache.stats(),
        cache.show(),
        resident(cache),
        [
            (lease.id, lease.tokens, lease.pages.tolist(), lease.num_published, lease.partial_page, lease.partial_tokens)
            for lease in cache.leases()
        ],
        [cache.generation(page) for page in range(cache.stats().num_pages)],
    )


class CountingTree(RadixTree):
    """A RadixTree that counts its splits; an instance of RadixTree is made one in place."""

    __slots__ = ()
    splits: ClassVar[Counter[str]] = Counter()

    def _split(self, node, position):
        CountingTree.splits["splits"] += 1
        CountingTree.splits["splits of a leased node"] += node.lock_count > 0
        CountingTree.splits["splits of a node two leases lock"] += node.lock_count > 1
        return super()._split(node, position)


@dataclass
class HeldModel:
    """A lease, in the model."""

    lease: Lease
    name: bytes
    ids: Ids
    published: int  # pages
    own: list[int]
    partial: Key | None
    cursor: CursorModel | None


@dataclass
class CursorModel:
    """A cursor, in the model: its tokens, and how far it was cached when it last rested."""

    cursor: Cursor
    namespace: str | Namespace
    name: bytes
    ids: Ids
    reached: int = 0
    busy: bool = False


@dataclass
class CacheModel:
    """Page-level leaf-first LRU in a dict."""

    num_pages: int
    page_size: int
    pages: dict[Key, int] = field(default_factory=dict)
    used: dict[Key, int] = field(default_factory=dict)
    held: list[HeldModel] = field(default_factory=list)
    freed: Counter[int] = field(default_factory=Counter)  # how often each page went back
    clock: int = 0

    @property
    def num_leased(self) -> int:
        return sum(len(held.own) for held in self.held)

    @property
    def num_free(self) -> int:
        return self.num_pages - len(self.pages) - self.num_leased

    def match(self, name: bytes, ids: Ids, limit: int | None = None) -> tuple[int, int]:
        """Whole pages and further tokens that are cached."""
        size, whole = self.page_size, 0
        while len(ids) >= (whole + 1) * size and (name, ids[: (whole + 1) * size]) in self.pages:
            whole += 1
        rest = ids[whole * size :]
        tokens = max((common(key[whole * size :], rest) for key in self.below(name, ids[: whole * size], 1)), default=0)
        if limit is not None:
            whole, tokens = divmod(min(whole * size + tokens, max(limit, 0)), size)
        return whole, tokens

    def below(self, name: bytes, ids: Ids, depth: int | None = None) -> list[Ids]:
        """Prefixes in the tree that continue `ids` (whole pages), by exactly `depth` pages if given."""
        lengths = None if depth is None else len(ids) + depth * self.page_size
        return [
            key
            for other, key in self.pages
            if other == name and len(key) > len(ids) and key[: len(ids)] == ids and lengths in (None, len(key))
        ]

    def protected(self) -> set[Key]:
        """Every page that some lease stands on: its published path, and the page it copies from."""
        keys: set[Key] = set()
        for held in self.held:
            ends = [held.ids[: held.published * self.page_size]]
            ends += [held.partial[1]] if held.partial else []
            for ids in ends:
                keys.update((held.name, ids[:end]) for end in range(self.page_size, len(ids) + 1, self.page_size))
        return keys

    def touch(self, name: bytes, ids: Ids) -> None:
        self.clock += 1
        for end in range(self.page_size, len(ids) + 1, self.page_size):
            self.used[name, ids[:end]] = self.clock

    def evict(self, num_pages: int) -> list[Key]:
        """Oldest leaf first, deeper first where two are of one age."""
        gone = []
        for _ in range(num_pages):
            held = self.protected()
            leaves = [key for key in self.pages if key not in held and not self.below(*key)]
            if not leaves:
                break
            oldest = min(leaves, key=lambda key: (self.used[key], -len(key[1])))
            self.drop(oldest)
            gone.append(oldest)
        return gone

    def drop(self, key: Key) -> None:
        self.freed[self.pages[key]] += 1
        del self.pages[key], self.used[key]


class Replayer:
    """Where every page is and what it stands for, told by the events alone."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.free = set(range(num_pages))
        self.leased: dict[int, list[int]] = {}
        self.tree: dict[int, tuple[bytes, int, Ids]] = {}  # page -> its namespace, position in pages, tokens
        self.lookups = self.lookup_tokens = self.hit_tokens = self.evicted = 0
        self.tick = 0
        self.last: object = None

    def __call__(self, event: object) -> None:
        assert event.tick > self.tick, event
        self.tick, self.last = event.tick, event
        getattr(self, "_" + type(event).__name__.lower())(event)

    def _looked(self, event: Looked) -> None:
        assert event.lease_id not in self.leased
        self.leased[event.lease_id] = []
        self.lookups += 1
        self.lookup_tokens += event.num_tokens
        self.hit_tokens += event.num_matched

    def _attached(self, event: Attached) -> None:
        own = self.leased[event.lease_id]
        self.free.update(own[: event.num_freed])
        del own[: event.num_freed]
        self.hit_tokens += event.num_tokens

    def _reserved(self, event: Reserved) -> None:
        assert self.free.issuperset(event.pages)
        self.free.difference_update(event.pages)
        self.leased[event.lease_id].extend(event.pages)

    def _stored(self, event: Stored) -> None:
        size, ids = self.page_size, tuple(memoryview(event.tokens).cast("i").tolist())
        num_new, own = len(ids) // size, self.leased[event.lease_id]
        assert num_new == event.num_duplicate + len(event.pages)
        assert own[event.num_duplicate : num_new] == list(event.pages)
        self.free.update(own[: event.num_duplicate])
        for index in range(event.num_duplicate, num_new):
            page_ids = ids[index * size : (index + 1) * size]
            self.tree[own[index]] = (event.namespace, event.start + index, page_ids)
        del own[:num_new]

    def _released(self, event: Released) -> None:
        own = self.leased.pop(event.lease_id)
        assert len(own) == event.num_freed
        self.free.update(own)

    def _evicted(self, event: Evicted) -> None:
        for index, page in enumerate(event.pages):  # a run off the end of one path, from page `start` on
            assert self.tree.pop(page)[:2] == (event.namespace, event.start + index)
        assert event.last_tick < event.tick
        self.free.update(event.pages)
        self.evicted += len(event.pages)

    def _removed(self, event: Removed) -> None:
        for page in event.pages:
            assert self.tree.pop(page)[0] == event.namespace
        self.free.update(event.pages)

    def check(self, cache: PrefixCache) -> None:
        size = self.page_size
        assert sorted(self.free) == cache._allocator.pool.free_pages()
        assert {lease.id: lease._own.tolist() for lease in cache.leases()} == self.leased
        told = {page: (name, len(ids) // size - 1, ids[-size:]) for (name, ids), page in resident(cache).items()}
        assert self.tree == told
        stats = cache.stats()
        assert (stats.lookups, stats.lookup_tokens) == (self.lookups, self.lookup_tokens)
        assert (stats.hit_tokens, stats.evicted_pages) == (self.hit_tokens, self.evicted)


class World:
    """The real cache and the models side by side; every operation checks its own answer, `check` all the rest."""

    def __init__(self, num_pages: int, page_size: int, situations: Counter[str] | None = None) -> None:
        self.events = Replayer(num_pages, page_size)
        self.cache = PrefixCache(num_pages, page_size, on_event=self.events)
        self.cache._tree.__class__ = CountingTree
        assert self.cache.generation(0) == 0  # they are counted from here on
        self.model = CacheModel(num_pages, page_size)
        self.cursors: list[CursorModel] = []
        self.names = {namespace_key(namespace): namespace for namespace in NAMESPACES}
        self.seen = Counter() if situations is None else situations

    # -- operations ---------------------------------------------------------------------------------------------------

    def acquire(self, namespace: str | Namespace, ids: Ids, limit: int | None = None) -> HeldModel:
        lease = self.cache.acquire(list(ids), namespace, limit=limit, owner="world")
        return self._leased(lease, namespace_key(namespace), ids, limit, None)

    def acquire_cursor(self, cursor: CursorModel, limit: int | None = None) -> HeldModel:
        lease = self.cache.acquire(cursor.cursor, limit=limit)
        cursor.busy = True
        held = self._leased(lease, cursor.name, cursor.ids, limit, cursor)
        if limit is None:
            self.seen["cursor look-ups"] += cursor.reached > 0
            self.seen["cursor fall-backs"] += held.published < cursor.reached
        return held

    def _leased(self, lease, name, ids, limit, cursor) -> HeldModel:
        whole, tokens = self.model.match(name, ids, limit)
        assert lease.num_matched == whole * self.model.page_size + tokens
        assert lease.num_published == whole * self.model.page_size
        assert (lease.num_tokens, lease.partial_tokens, lease.namespace) == (len(ids), tokens, name)
        partial = None
        if tokens:
            head = ids[: whole * self.model.page_size + tokens]
            partial = next(key for key, page in self.model.pages.items() if page == lease.partial_page)
            assert partial[0] == name and partial[1][: len(head)] == head
            assert len(partial[1]) == (whole + 1) * self.model.page_size
        else:
            assert lease.partial_page is None
        self.seen["hits"] += whole > 0
        self.seen["partial-page hits"] += tokens > 0
        held = HeldModel(lease, name, ids, whole, [], partial, cursor)
        self.model.held.append(held)
        return held

    def extend(self, held: HeldModel, ids: Ids = (), spare: int = 0) -> bool:
        """Whether it got its pages."""
        model = self.model
        total = held.ids + ids
        needed = max(0, -(-(len(total) + spare) // model.page_size) - held.published - len(held.own))
        evictable = len(model.pages.keys() - model.protected())
        partial = held.partial
        if needed > model.num_free + evictable and partial is not None:
            held.partial = None  # the page it would copy from is given up where nothing else helps
            evictable = len(model.pages.keys() - model.protected())
            self.seen["partial pages given up"] += needed <= model.num_free + evictable
        if needed > model.num_free + evictable:
            held.partial = partial
            before = snapshot(self.cache)
            error = raised(PoolExhausted, held.lease.extend, list(ids), spare)
            assert (error.needed, error.free, error.evictable, error.leased) == (
                needed,
                model.num_free,
                evictable,
                model.num_leased,
            )
            assert snapshot(self.cache) == before
            self.seen["exhaustions"] += 1
            return False
        held.lease.extend(list(ids), spare)
        if held.partial is None:
            assert held.lease.partial_tokens == 0
        self.seen["evictions"] += len(model.evict(needed - model.num_free))
        held.ids = total
        if held.cursor:
            held.cursor.ids = total
        held.own += held.lease.pages.tolist()[held.published + len(held.own) :]
        return True

    def attach(self, held: HeldModel, limit: int | None = None) -> None:
        """Take over what others have published where its own run ends."""
        model, size, lease = self.model, self.model.page_size, held.lease
        whole, tokens = model.match(held.name, held.ids, limit)
        pages, before = whole - held.published, lease.partial_tokens
        if pages < 0 or (pages == 0 and tokens <= before):
            assert lease.attach(limit) == 0
            return
        gained, matched = pages * size + tokens - before, lease.num_matched
        assert lease.attach(limit) == gained
        assert (lease.num_matched, lease.partial_tokens) == (matched + gained, tokens)
        self.seen["attached pages"] += pages
        dropped, held.own = held.own[:pages], held.own[pages:]
        model.freed.update(dropped)
        self.seen["reserved pages given back by attaching"] += len(dropped)
        held.published, held.partial = whole, None
        if tokens:
            held.partial = next(key for key, page in model.pages.items() if page == lease.partial_page)
            head = held.ids[: whole * size + tokens]
            assert held.partial[0] == held.name and held.partial[1][: len(head)] == head

    def commit(self, held: HeldModel, num_tokens: int) -> None:
        model, size = self.model, self.model.page_size
        if not 0 <= num_tokens <= min(len(held.ids), (held.published + len(held.own)) * size):
            before = snapshot(self.cache)
            raised(ConfigError, held.lease.commit, num_tokens)
            assert snapshot(self.cache) == before
            return
        duplicates = 0
        for end in range((held.published + 1) * size, num_tokens + 1, size):
            key, page = (held.name, held.ids[:end]), held.own.pop(0)
            held.published += 1
            held.partial = None
            if key in model.pages:
                duplicates += 1
                model.freed[page] += 1
            else:
                model.pages[key] = page
                self.seen["real inserts"] += 1
        model.touch(held.name, held.ids[: held.published * size])
        assert held.lease.commit(num_tokens) == duplicates
        self.seen["duplicate commits"] += duplicates > 0

    def release(self, held: HeldModel) -> None:
        if held.published:
            self.model.touch(held.name, held.ids[: held.published * self.model.page_size])
        self.model.freed.update(held.own)
        self.model.held.remove(held)
        if held.cursor:
            held.cursor.busy = False
            held.cursor.reached = held.published
        held.lease.release()
        self.seen["releases"] += 1
        for use in (held.lease.release, held.lease.extend, held.lease.commit, lambda: held.lease.pages):
            raised(LeaseReleased, use)

    def request(self, namespace: str | Namespace, ids: Ids) -> None:
        """What an engine does: leave the last token to compute, fill, publish, go."""
        held = self.acquire(namespace, ids, limit=len(ids) - 1)
        if self.extend(held):
            self.commit(held, len(ids))
        self.release(held)

    def evict(self, num_pages: int) -> None:
        gone = self.model.evict(num_pages)
        assert self.cache.evict(num_pages) == len(gone)
        self.seen["evictions"] += len(gone)

    def remove(self, namespace: str | Namespace, ids: Ids) -> None:
        name, cut = namespace_key(namespace), len(ids) - len(ids) % self.model.page_size
        asked = [key for key in self.model.below(name, ids[:cut]) if key[: len(ids)] == ids]
        self._removed(self.cache.remove(list(ids), namespace), {(name, key) for key in asked})

    def _removed(self, removal, asked: set[Key]) -> None:
        gone = asked - self.model.protected()
        assert sorted(removal.pages) == sorted(self.model.pages[key] for key in gone)
        assert removal.num_locked == len(asked) - len(gone)
        self.seen["removals"] += len(gone)
        for key in gone:
            self.model.drop(key)

    def flush(self) -> None:
        gone = self.model.pages.keys() - self.model.protected()
        for key in gone:
            self.model.drop(key)
        self.seen["removals"] += len(gone)
        assert self.cache.flush() == len(self.model.pages)

    def cursor(self, namespace: str | Namespace, ids: Ids) -> CursorModel:
        cursor = self.cache.cursor(namespace, list(ids))
        self.cursors.append(CursorModel(cursor, namespace, namespace_key(namespace), ids))
        return self.cursors[-1]

    def append(self, cursor: CursorModel, ids: Ids) -> None:
        if cursor.busy:
            raised(CursorBusy, cursor.cursor.append, list(ids))
        else:
            cursor.cursor.append(list(ids))
            cursor.ids += ids

    def truncate(self, cursor: CursorModel, num_tokens: int) -> None:
        if cursor.busy:
            raised(CursorBusy, cursor.cursor.truncate, num_tokens)
        else:
            cursor.cursor.truncate(num_tokens)
            cursor.ids = cursor.ids[:num_tokens]
            cursor.reached = min(cursor.reached, num_tokens // self.model.page_size)

    def fork(self, cursor: CursorModel) -> CursorModel:
        forked = CursorModel(cursor.cursor.fork(), cursor.namespace, cursor.name, cursor.ids, cursor.reached)
        self.cursors.append(forked)
        return self.cursors[-1]

    # -- laws ---------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        cache, model = self.cache, self.model
        cache.check()
        assert resident(cache) == model.pages
        self.events.check(cache)
        for held in model.held:
            path = [model.pages[held.name, held.ids[:end]] for end in self._ends(held)]
            assert held.lease.pages.tolist() == path + held.own
            assert tuple(held.lease.tokens) == held.ids
            assert held.lease.num_published == held.published * model.page_size
            assert held.lease.partial_page == (model.pages[held.partial] if held.partial else None)
        assert [cache.generation(page) for page in range(model.num_pages)] == [
            model.freed[page] for page in range(model.num_pages)
        ]
        for cursor in self.cursors:
            assert tuple(cursor.cursor.tokens) == cursor.ids
        stats = cache.stats()
        assert (stats.num_free, stats.num_leased) == (model.num_free, model.num_leased)
        assert stats.num_evictable + stats.num_locked == len(model.pages)
        assert stats.num_evictable <= len(model.pages.keys() - model.protected())
        assert stats.num_leases == len(model.held) == len(cache.leases())
        live = {key[0] for key in model.pages} | {held.name for held in model.held}
        assert stats.num_namespaces == len(live)

    def _ends(self, held: HeldModel) -> range:
        return range(self.model.page_size, held.published * self.model.page_size + 1, self.model.page_size)

    def close(self) -> None:
        """Everything can be given back: no page leaks, no root stays."""
        for held in list(self.model.held):
            self.release(held)
        self.evict(self.model.num_pages)
        self.check()
        assert self.cache.stats().num_free == self.model.num_pages
        assert not self.cache._tree.roots
