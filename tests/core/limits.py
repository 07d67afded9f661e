"""Retention, pins and quotas beside a page-level model, on random walks.

The model knows, of each cached page, the wish that holds and the second it was last used: no nodes, no levels, no heaps.
Which victim a policy picks inside a level is the policy's business; that it is of the lowest level, of a namespace that
may be taken from, and the oldest under LRU, is looked up among all leaves, one by one, at every single eviction.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from random import Random

from radixkv.allocator import Allocator
from radixkv.cache import PrefixCache
from radixkv.errors import ConfigError, PinBudgetExceeded, PinError, PinReleased, PoolExhausted, QuotaExceeded
from radixkv.lease import Lease
from radixkv.pins import Pin
from radixkv.policies import POLICIES
from radixkv.retention import Retain
from tests.core.models import Ids, Key, namespace_key, raised, resident, snapshot

NAMESPACES = ("", "a", "b")
OWNERS = ("ops", "app")
PRIORITIES = (0, 3, 19, 31, 35, 39, 51, 99, 100)  # those with a time are powers of 2 away from 35: sums stay exact

SITUATIONS = (
    "retentions",
    "wishes that lost",
    "wishes that won over another",
    "hits on retained pages",
    "falls",
    "evictions across levels",
    "evictions below the default",
    "evictions above the default",
    "evictions across groups",
    "leaves spared by a reservation",
    "reservation refusals",
    "quota refusals",
    "quota evictions",
    "evictions by lowering a quota",
    "quota changes refused",
    "pins",
    "pins that share pages",
    "pins refused by the budget",
    "pins refused by the owner's budget",
    "pins of nothing",
    "pins through a removal",
    "exhaustions",
    "policy switches with retained leaves",
)


@dataclass
class Held:
    """A lease, in the model."""

    lease: Lease
    name: bytes
    ids: Ids
    num_found: int
    wishes: list[Retain]


@dataclass
class Pinned:
    """A pin, in the model."""

    pin: Pin
    keys: set[Key]


class WatchedAllocator(Allocator):
    """An Allocator that tells the walk of every victim; an instance of Allocator is made one in place."""

    __slots__ = ()
    walk: LimitsWalk

    def evict_for(self, num_pages, asker):
        WatchedAllocator.walk.context = "for", asker
        return super().evict_for(num_pages, asker)

    def evict_of(self, num_pages, account):
        WatchedAllocator.walk.context = "of", account
        return super().evict_of(num_pages, account)

    def evict(self, num_pages):
        WatchedAllocator.walk.context = "all", None
        return super().evict(num_pages)

    def _trim(self, leaf, num_pages):
        return WatchedAllocator.walk.watch(leaf, num_pages, super()._trim)


def level(wish: Retain | None, used_s: int, now_s: int) -> int:
    """The level of a page, from the definition, in exact numbers."""
    if wish is None or (wish.ttl_s is not None and now_s - used_s >= wish.ttl_s):
        return 35
    if wish.ttl_s is None or wish.decay == "step":
        return wish.priority
    way = Fraction(wish.priority - 35) * Fraction(now_s - used_s) / Fraction(wish.ttl_s)
    return wish.priority - (int(way) if way > 0 else -int(-way))


def strength(wish: Retain | None):
    """Stronger wishes are greater: by priority, then by how long they hold it above 35, or do not below."""
    if wish is None:
        return 35, 0
    lasts = float("inf") if wish.ttl_s is None else wish.ttl_s * (1 if wish.decay == "step" else 0.5)
    return wish.priority, lasts if wish.priority > 35 else -lasts


def ids_of(node) -> Ids:
    parts = []
    while node is not None:
        parts.append(memoryview(bytes(node.key)).cast("i").tolist())
        node = node.parent
    return tuple(token for part in reversed(parts) for token in part)


class LimitsWalk:
    """One cache with everything switched on, and the steps through it."""

    def __init__(self, random: Random, seen: Counter[str]) -> None:
        self.random, self.seen = random, seen
        self.size, self.num_pages = random.choice((1, 2, 3)), random.choice((8, 10, 12, 16))
        self.policy = random.choice(sorted(POLICIES))
        self.now_s = 0
        budget = random.choice((self.num_pages // 2, 3, 2))
        self.budget, self.owner_budget = budget, random.choice((None, None, budget // 2))
        self.cache = PrefixCache(
            self.num_pages,
            self.size,
            policy=self.policy,
            pin_budget_pages=budget,
            pin_budget_per_owner=self.owner_budget,
            clock=lambda: float(self.now_s),
        )
        self.cache._allocator.__class__ = WatchedAllocator
        WatchedAllocator.walk = self
        self.context = "all", None
        self.wishes: dict[Key, Retain | None] = {}
        self.used_s: dict[Key, int] = {}
        self.held: list[Held] = []
        self.pinned: list[Pinned] = []
        self.quotas: dict[bytes, tuple[int | None, int]] = {}
        self.pages: list[Ids] = [(1,) * self.size, (1,) * (self.size - 1) + (2,), (3,) * self.size]
        self.falls = 0
        self.lowering = False

    # -- the model ----------------------------------------------------------------------------------------------------

    def path(self, name: bytes, ids: Ids, num_pages: int) -> list[Key]:
        return [(name, ids[: end * self.size]) for end in range(1, num_pages + 1)]

    def protected(self, giving: Held | None = None) -> set[Key]:
        """What leases and pins stand on; `giving` has given up the page it would copy from."""
        keys = {key for one in self.pinned for key in one.keys}
        for held in self.held:
            if not held.lease.released:
                used = held.lease.num_published // self.size
                keys.update(self.path(held.name, held.ids, used))
                partial = held.lease.partial_page
                if partial is not None and held is not giving:
                    end = next(key for key, page in resident(self.cache).items() if page == partial)
                    keys.update(self.path(held.name, end[1], len(end[1]) // self.size))
        return keys

    def sync(self) -> None:
        """Pages come with no wish, and what has gone is forgotten."""
        there = resident(self.cache)
        for key in [key for key in self.wishes if key not in there]:
            del self.wishes[key]
            self.used_s.pop(key, None)
        for key in there:
            self.wishes.setdefault(key, None)

    def of(self, name: bytes, keys) -> int:
        return sum(key[0] == name for key in keys)

    def leased(self, name: bytes) -> int:
        return sum(held.lease.num_own_pages for held in self.held if held.name == name)

    def level_of(self, leaf) -> int:
        key = leaf.namespace, ids_of(leaf)
        return level(self.wishes[key], self.used_s.get(key, 0), self.now_s)

    # -- what is watched ----------------------------------------------------------------------------------------------

    def watch(self, leaf, num_pages, trim) -> int:
        """Is this the right victim? Then let it go."""
        self.sync()  # pages that were committed in this step
        mode, asker = self.context
        tree = self.cache._tree
        leaves = [node for node in tree.walk() if node.parent is not None and not node.children and not node.lock_count]
        reserved = {name: quota[1] for name, quota in self.quotas.items()}
        if mode == "of":
            allowed = [node for node in leaves if node.account is asker]
        else:
            allowed = [
                node for node in leaves if node.account is asker or node.account.num_pages > reserved.get(node.namespace, 0)
            ]
        assert leaf in allowed
        levels = {node: self.level_of(node) for node in leaves}
        lowest = min(levels[node] for node in allowed)
        assert levels[leaf] == lowest, (leaf, levels)
        if self.policy in ("lru", "priority"):
            assert leaf.tick == min(node.tick for node in allowed if levels[node] == lowest)
        older = [node for node in allowed if node.tick < leaf.tick]
        self.seen["evictions across levels"] += any(levels[node] > lowest for node in older)
        self.seen["evictions across groups"] += mode == "for" and any(node.account is not leaf.account for node in allowed)
        self.seen["evictions below the default"] += lowest < 35
        self.seen["evictions above the default"] += lowest > 35
        self.seen["leaves spared by a reservation"] += mode == "for" and len(allowed) < len(leaves)
        self.seen["quota evictions"] += mode == "of"
        self.seen["evictions by lowering a quota"] += mode == "of" and self.lowering
        account = leaf.account
        taken = trim(leaf, num_pages)
        if account is not asker:
            assert account.num_pages >= reserved.get(account.key, 0)
        return taken

    def check(self) -> None:
        self.sync()
        cache = self.cache
        cache.check()
        there = resident(cache)
        for node in cache._tree.walk():
            ids = ids_of(node)
            for end in range(node.start + 1, node.end + 1):
                assert node.retain == self.wishes[node.namespace, ids[: end * self.size]], (node, end)
            if node.parent is not None and not node.children and not node.lock_count:
                assert node.time_s == self.used_s[node.namespace, ids]
                if node.retain is not None:
                    assert node.retain.standing(node.time_s, float(self.now_s)).level == self.level_of(node)
        keys = {key for one in self.pinned for key in one.keys}
        assert keys <= there.keys()
        assert cache.stats().num_pinned == len(keys) <= self.budget
        assert [pin.id for pin in cache.pins()] == [one.pin.id for one in self.pinned]
        for owner in OWNERS:
            assert len(self.owned(owner)) <= (self.budget if self.owner_budget is None else self.owner_budget)
        for namespace in NAMESPACES:
            name = namespace_key(namespace)
            usage = cache.usage(namespace)
            assert (usage.max_pages, usage.reserved_pages) == self.quotas.get(name, (None, 0))
            assert (usage.num_pages, usage.num_leased) == (self.of(name, there), self.leased(name))
        assert sum(quota[1] for quota in self.quotas.values()) <= self.num_pages - 1
        levels = cache._allocator.levels
        if levels is not None:
            assert len(levels._heads) <= 4 * len(levels._groups) + 64 + len(levels._groups) + 1
            self.seen["falls"] += max(levels.num_falls - self.falls, 0)
            self.falls = levels.num_falls

    def owned(self, owner: str) -> set[Key]:
        return {key for one in self.pinned if one.pin.owner == owner for key in one.keys}

    # -- choices ------------------------------------------------------------------------------------------------------

    def key(self) -> tuple[str, Ids]:
        """Something cached, as it is, cut short or longer; or something new."""
        random = self.random
        namespace, base = random.choice(NAMESPACES), ()
        if self.wishes and random.random() < 0.7:
            name, base = random.choice(list(self.wishes))
            namespace = next(one for one in NAMESPACES if namespace_key(one) == name)
            base = base[: max(len(base) // self.size - random.choice((0, 0, 1, 2)), 0) * self.size]
        for _ in range(random.randrange(4)):
            base += random.choice(self.pages)
        return namespace, base[: 7 * self.size] + self.pages[0][: random.randrange(self.size)]

    def ranges(self, num_tokens: int) -> list[Retain]:
        """Up to two disjoint ranges."""
        random = self.random
        if random.random() < 0.3:
            return []
        cuts = sorted(random.sample(range(num_tokens + 3), min(4, num_tokens + 3)))
        made = []
        for start, stop in (cuts[0:2], cuts[2:4])[: random.choice((1, 2))] if len(cuts) == 4 else (cuts[:2],):
            priority = random.choice(PRIORITIES)
            ttl_s, decay = None, "step"
            if priority not in (0, 100) and random.random() < 0.6:
                ttl_s, decay = random.choice((1, 4, 16)), random.choice(("step", "linear"))
            made.append(Retain(start, stop, priority, ttl_s, decay))
        if random.random() < 0.4:
            made[-1] = Retain(made[-1].start, None, made[-1].priority, made[-1].ttl_s, made[-1].decay)
        random.shuffle(made)
        return made

    # -- steps --------------------------------------------------------------------------------------------------------

    def begin(self) -> Held:
        """A request that finds, fills and publishes what it can, and stays."""
        namespace, ids = self.key()
        wishes = self.ranges(len(ids))
        limit = self.random.choice((None, None, len(ids) - 1))
        if self.random.random() < 0.5:
            lease = self.cache.acquire(list(ids), namespace, limit=limit, retention=wishes)
        else:
            lease = self.cache.acquire(list(ids), namespace, limit=limit, retention=[Retain(0, None, 50)])
            lease.retain(wishes)
        held = Held(lease, namespace_key(namespace), ids, lease.num_published // self.size, wishes)
        self.held.append(held)
        if self.random.random() < 0.75 and self.fill(held):  # else its lock may reach further than what it uses
            start = lease.num_published // self.size
            duplicates = lease.commit(self.random.choice((len(ids), len(ids), len(ids) // 2)))
            held.num_found = max(held.num_found, start + duplicates if duplicates else 0)
            self.sync()
        return held

    def fill(self, held: Held) -> bool:
        """Whether it got its pages; the model says which error there must be."""
        there, name = resident(self.cache), held.name
        needed = -(-len(held.ids) // self.size) - held.lease.num_published // self.size - held.lease.num_own_pages
        most, _ = self.quotas.get(name, (None, 0))
        used = self.of(name, there) + self.leased(name)
        over = 0 if most is None else max(used + needed - most, 0)
        num_free = self.cache.stats().num_free
        others = [one for one in map(namespace_key, NAMESPACES) if one != name]
        spare = {one: max(self.of(one, there) - self.quotas.get(one, (None, 0))[1], 0) for one in others}
        for giving in (None, held):  # the page that it would copy from is given up where nothing else helps
            safe = self.protected(giving)
            own = self.of(name, there.keys() - safe)
            loose = {one: self.of(one, there.keys() - safe) for one in others}
            total = own + sum(min(loose[one], spare[one]) for one in others)
            refused = needed > 0 and (over > own or needed - num_free > total)
            if not refused or held.lease.partial_page is None:
                break
        if refused:
            before = snapshot(self.cache), self.cache.quotas(), self.cache._tree.num_nodes
            if over > own:
                error = raised(QuotaExceeded, held.lease.extend)
                assert (error.needed, error.max_pages, error.used, error.evictable) == (needed, most, used, own)
                assert namespace_key(error.namespace) == name
                self.seen["quota refusals"] += 1
            else:
                error = raised(PoolExhausted, held.lease.extend)
                assert (error.needed, error.free, error.evictable) == (needed, num_free, total)
                self.seen["exhaustions"] += 1
                self.seen["reservation refusals"] += needed - num_free <= own + sum(loose.values())
            assert (snapshot(self.cache), self.cache.quotas(), self.cache._tree.num_nodes) == before
            return False
        held.lease.extend()
        self.sync()
        if needed > 0 and most is not None:
            assert self.of(name, resident(self.cache)) + self.leased(name) <= most
        return True

    def finish(self) -> None:
        if self.held:
            self.end(self.random.choice(self.held))

    def request(self) -> None:
        self.end(self.begin())

    def end(self, held: Held) -> None:
        """Release, and write down what must be true of each page of the path."""
        num_pages = held.lease.num_published // self.size
        held.lease.release()
        self.held.remove(held)
        self.sync()
        for index, key in enumerate(self.path(held.name, held.ids, num_pages)):
            self.used_s[key] = self.now_s
            kept = self.wishes[key]
            self.seen["hits on retained pages"] += kept is not None
            wish = next((one for one in held.wishes if one.start <= index * self.size < (one.stop or 10**9)), None)
            if wish is None:
                continue
            self.seen["retentions"] += 1
            if (kept is None and index >= held.num_found) or strength(wish) > strength(kept):
                self.seen["wishes that won over another"] += kept is not None
                self.wishes[key] = wish if wish.priority != 35 else None
            else:
                self.seen["wishes that lost"] += 1

    def wait(self) -> None:
        self.now_s += self.random.choice((1, 1, 2, 5, 20))

    def pin(self) -> None:
        """Weigh it, compare with the model, do it."""
        namespace, ids = self.key()
        owner = self.random.choice(OWNERS)
        name, there, size = namespace_key(namespace), resident(self.cache), self.size
        num_pages = 0
        while len(ids) >= (num_pages + 1) * size and (name, ids[: (num_pages + 1) * size]) in there:
            num_pages += 1
        keys = set(self.path(name, ids, num_pages))
        pinned, owned = {key for one in self.pinned for key in one.keys}, self.owned(owner)
        before = snapshot(self.cache), self.cache.pins()
        cost = self.cache.pin_cost(list(ids), namespace, owner=owner)
        assert (snapshot(self.cache), self.cache.pins()) == before
        left = self.budget - len(pinned)
        assert (cost.num_tokens, cost.cached_tokens) == (len(ids), num_pages * size)
        assert (cost.added_pages, cost.pinned_pages) == (len(keys - pinned), len(keys & pinned))
        assert (cost.left_before, cost.left_after) == (left, left - len(keys - pinned))
        assert cost.evictable_after == len(there.keys() - self.protected() - keys)
        owner_left = None if self.owner_budget is None else self.owner_budget - len(owned)
        assert cost.owner_left_before == owner_left
        assert cost.owner_added_pages == len(keys - owned)
        if not keys:
            assert raised(PinError, self.refused_pin, ids, namespace, owner).reason == "not_cached" == cost.refusal
            self.seen["pins of nothing"] += 1
        elif len(keys - pinned) > left:
            error = raised(PinBudgetExceeded, self.refused_pin, ids, namespace, owner)
            assert (error.needed, error.left, error.owner, error.budget) == (len(keys - pinned), left, owner, self.budget)
            assert cost.refusal == "budget"
            self.seen["pins refused by the budget"] += 1
        elif owner_left is not None and len(keys - owned) > owner_left:
            error = raised(PinBudgetExceeded, self.refused_pin, ids, namespace, owner)
            assert (error.needed, error.left, error.budget) == (len(keys - owned), owner_left, self.owner_budget)
            assert cost.refusal == "owner_budget"
            self.seen["pins refused by the owner's budget"] += 1
        else:
            assert cost.allowed
            made = self.cache.pin(list(ids), namespace, owner=owner)
            assert (made.num_pages, made.num_tokens, made.namespace) == (num_pages, num_pages * size, name)
            self.pinned.append(Pinned(made, keys))
            self.seen["pins"] += 1
            self.seen["pins that share pages"] += bool(keys & pinned)
        if not cost.allowed:
            assert (snapshot(self.cache), self.cache.pins()) == before

    def refused_pin(self, ids: Ids, namespace: str, owner: str) -> None:
        self.cache.pin(list(ids), namespace, owner=owner)

    def unpin(self) -> None:
        if self.pinned:
            one = self.pinned.pop(self.random.randrange(len(self.pinned)))
            one.pin.release()
            raised(PinReleased, one.pin.release)

    def squeeze(self) -> None:
        """Take a page from a namespace while a lease locks more of an edge than it uses."""
        if self.wishes and len(self.held) < 3:
            name, ids = self.random.choice(list(self.wishes))
            namespace = next(one for one in NAMESPACES if namespace_key(one) == name)
            ids = ids[: -self.size]
            lease = self.cache.acquire(list(ids), namespace)
            self.held.append(Held(lease, name, ids, lease.num_published // self.size, []))
            most, reserved = self.quotas.get(name, (None, 0))
            self.limit(namespace, self.random.choice((0, 1, 2)), 0)
            self.limit(namespace, most, reserved)

    def quota(self) -> None:
        """Other limits for a namespace, or none."""
        random = self.random
        namespace = random.choice(NAMESPACES)
        name = namespace_key(namespace)
        used = self.of(name, resident(self.cache)) + self.leased(name)
        most = random.choice((None, None, 2, 4, max(used - 1, 0), max(used - 2, 0), self.num_pages // 2, self.num_pages))
        most_reserved = self.num_pages - 1 - self.budget
        reserved = random.choice((0, 0, 1, most_reserved // 2, most_reserved, most_reserved, self.num_pages - 1))
        self.limit(namespace, most, reserved)

    def limit(self, namespace: str, most: int | None, reserved: int) -> None:
        name = namespace_key(namespace)
        others = sum(quota[1] for other, quota in self.quotas.items() if other != name)
        if (most is not None and reserved > most) or reserved > max(self.num_pages - 1 - self.budget - others, 0):
            before = snapshot(self.cache), self.cache.quotas()
            raised(ConfigError, self.cache.set_quota, namespace, most, reserved)
            assert (snapshot(self.cache), self.cache.quotas()) == before
            self.seen["quota changes refused"] += 1
            return
        if (most, reserved) == (None, 0):
            self.quotas.pop(name, None)
        else:
            self.quotas[name] = most, reserved
        there, safe = resident(self.cache), self.protected()
        over = 0 if most is None else max(self.of(name, there) + self.leased(name) - most, 0)
        self.lowering = True
        gone = self.cache.set_quota(namespace, most, reserved)
        self.lowering = False
        assert gone == min(over, self.of(name, there.keys() - safe))

    def evict(self) -> None:
        self.cache.evict(self.random.choice((1, 1, 2, 3)))

    def remove(self) -> None:
        namespace, ids = self.key()
        removal = self.cache.remove(list(ids[:-1]), namespace)
        self.seen["pins through a removal"] += removal.num_locked > 0 and bool(self.pinned)

    def flush(self) -> None:
        assert self.cache.flush() == len(self.protected())

    def switch(self) -> None:
        self.policy = self.random.choice(sorted(POLICIES))
        self.cache.set_policy(self.policy)
        self.falls = 0
        self.seen["policy switches with retained leaves"] += any(self.wishes.values())


WEIGHTS = {
    "request": 10,
    "begin": 2,
    "finish": 3,
    "wait": 4,
    "pin": 3,
    "unpin": 2,
    "quota": 1.5,
    "squeeze": 0.5,
    "evict": 1,
    "remove": 1,
    "flush": 0.1,
    "switch": 0.5,
}


def limits_walk(seed: int, num_worlds: int, num_steps: int = 100) -> Counter[str]:
    """Walk through caches one after another; return how often each situation occurred."""
    random, seen = Random(seed), Counter()
    for _ in range(num_worlds):
        walk = LimitsWalk(random, seen)
        said: list[str] = []
        try:
            for name in random.choices(list(WEIGHTS), list(WEIGHTS.values()), k=num_steps):
                if name != "begin" or len(walk.held) < 3:
                    said.append(name)
                    getattr(walk, name)()
                    walk.check()
            close(walk)
        except Exception as error:
            error.add_note(f"{walk.policy}, {walk.num_pages} pages of {walk.size}: " + " ".join(said))
            raise
    return seen


def close(walk: LimitsWalk) -> None:
    """Everything can be given back."""
    while walk.held:
        walk.end(walk.held[-1])
    while walk.pinned:
        walk.unpin()
    walk.flush()
    walk.check()
    assert walk.cache.stats().num_free == walk.num_pages
    assert not walk.cache._tree.roots
