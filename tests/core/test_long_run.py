from __future__ import annotations

from random import Random

from radixkv.cache import PrefixCache
from radixkv.errors import PoolExhausted

NUM_OPERATIONS = 200_000
NUM_PAGES = 120
CHECK_EVERY = 5_000


class Run:
    """Plain random operations, as a careless engine would make them, on whole pages of four tokens."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.cache = PrefixCache(NUM_PAGES, 4)
        self.leases = []
        self.cursors = [self.cache.cursor(random_salt) for random_salt in ("", "", "b")]
        self.keys: list[bytes] = [b""]
        self.choices = [bytes([1, 0, 0, 0] * 3 + [last, 0, 0, 0]) for last in range(3)]
        self.done = dict.fromkeys(("acquire", "fill", "release", "turn", "evict", "remove", "match"), 0)
        self.refused = self.duplicates = self.hits = 0

    def key(self) -> bytes:
        """An earlier key, cut short and made longer."""
        random = self.random
        base = self.keys[random.randrange(len(self.keys))]
        pages = base[: random.randrange(len(base) // 16 + 1) * 16] if random.random() < 0.5 else base
        for _ in range(random.randrange(4)):
            pages += self.choices[random.randrange(3)]
        key = pages[: 40 * 16]
        if len(self.keys) < 500:
            self.keys.append(key)
        else:
            self.keys[random.randrange(500)] = key
        return key + bytes(4 * random.randrange(4))

    def acquire(self) -> None:
        if len(self.leases) < 10:
            limit = self.random.choice((None, None, 30))
            lease = self.cache.acquire(self.key(), self.random.choice(("", "", "", "b")), limit=limit)
            self.hits += lease.num_matched > 0
            self.leases.append(lease)

    def fill(self) -> None:
        if self.leases:
            lease = self.random.choice(self.leases)
            try:
                lease.extend(self.random.choice((b"", self.choices[1], bytes(8))))
                short = self.random.choice((0, 0, 3, 9))
                self.duplicates += lease.commit(max(lease.num_tokens - short, 0))
            except PoolExhausted:
                self.refused += 1

    def release(self) -> None:
        if self.leases:
            self.leases.pop(self.random.randrange(len(self.leases))).release()

    def turn(self) -> None:
        place = self.random.randrange(3)
        cursor = self.cursors[place]
        if cursor.num_tokens > 200:
            cursor.truncate(self.random.randrange(200))
        elif self.random.random() < 0.1:
            self.cursors[self.random.randrange(2)] = self.cursors[place % 2].fork()
        cursor.append(self.choices[self.random.randrange(3)])
        with self.cache.acquire(cursor) as lease:
            try:
                lease.extend()
                lease.commit()
            except PoolExhausted:
                self.refused += 1

    def evict(self) -> None:
        self.cache.evict(self.random.randrange(3))

    def remove(self) -> None:
        if self.random.random() < 0.02:
            self.cache.flush()
        elif self.random.random() < 0.2:
            self.cache.remove(self.key()[: self.random.randrange(1, 4) * 16])

    def match(self) -> None:
        self.cache.match(self.key())

    def go(self, num_operations: int) -> None:
        names = list(self.done)
        for number, name in enumerate(self.random.choices(names, (5, 8, 5, 3, 0.5, 0.5, 1), k=num_operations)):
            getattr(self, name)()
            self.done[name] += 1
            if number % CHECK_EVERY == 0:
                self.cache.check()


def test_200_000_operations_leak_no_page_no_node_and_no_root():
    run = Run(7)
    run.go(NUM_OPERATIONS)
    cache = run.cache
    cache.check()
    assert min(run.done.values()) > 2_000
    assert run.refused > 20
    assert run.duplicates > 1_000
    assert run.hits > 10_000
    assert cache.stats().evicted_pages > 10_000
    for lease in run.leases:
        lease.release()
    cache.check()
    assert cache.stats().num_leased == cache.stats().num_locked == 0
    cache.evict(NUM_PAGES)
    cache.check()
    stats = cache.stats()
    assert (stats.num_free, stats.num_nodes, stats.num_leases, stats.num_namespaces) == (NUM_PAGES, 0, 0, 0)
    assert not cache._tree.roots
    assert len(cache._allocator.policy) == 0
    assert sorted(cache._allocator.pool._free) == list(range(NUM_PAGES))
