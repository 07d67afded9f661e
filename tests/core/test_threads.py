"""Calls from several threads never corrupt the cache, and no page that can be read is ever overwritten (I6)."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from random import Random
from threading import Barrier

import numpy as np
import pytest

from radixkv.cache import PrefixCache
from radixkv.errors import CursorBusy, PoolExhausted
from radixkv.lease import Lease

NUM_THREADS = 8


@pytest.fixture(autouse=True)
def _threads_switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(work, num_threads: int = NUM_THREADS) -> list:
    """Run `work(number)` in threads that start at once; what they raise is raised here."""
    barrier = Barrier(num_threads)

    def start(number: int):
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(num_threads) as threads:
        return [future.result() for future in [threads.submit(start, number) for number in range(num_threads)]]


def test_random_calls_from_eight_threads_leave_a_sound_cache():
    cache = PrefixCache(60, 2)
    shared = [cache.cursor(tokens=[1, 2]) for _ in range(2)]  # any thread may use them, and be told that they are busy

    def work(number: int) -> tuple[int, int, int]:
        random, leases, refused, busy = Random(number), [], 0, 0
        for count in range(2500):
            action = random.randrange(11)
            prompt = [random.randrange(2) for _ in range(random.randrange(14))]
            try:
                if action < 3 and len(leases) < 3:
                    leases.append(cache.acquire(prompt, random.choice(("", "", "b")), owner=str(number)))
                elif action < 5 and leases:
                    lease = random.choice(leases)
                    lease.extend(prompt[:3])
                    lease.commit(random.randrange(lease.num_published, lease.num_tokens + 1))
                    assert len(lease.pages) * 2 >= lease.num_tokens
                elif action < 7 and leases:
                    leases.pop(random.randrange(len(leases))).release()
                elif action == 7:
                    cache.evict(random.randrange(3))
                    assert cache.match(prompt) <= len(prompt)
                elif action == 8:
                    stats = cache.stats()
                    assert stats.num_free + stats.num_evictable + stats.num_locked + stats.num_leased == 60
                elif action == 9 and random.random() < 0.2:
                    cache.remove(prompt[:4])
                elif action == 10:
                    cursor = random.choice(shared)
                    if cursor.num_tokens > 20:
                        cursor.truncate(4)
                    cursor.append([random.randrange(2)])
                    with cache.acquire(cursor) as lease:
                        lease.extend()
                        lease.commit()
            except PoolExhausted:
                refused += 1
            except CursorBusy:
                busy += 1
            if count % 250 == 0:
                cache.check()
        for lease in leases:
            lease.release()
        return refused, busy, count

    assert all(count == 2499 for _, _, count in together(work))
    cache.check()
    stats = cache.stats()
    assert (stats.num_leases, stats.num_leased, stats.num_locked) == (0, 0, 0)
    assert stats.evicted_pages > 500
    cache.evict(60)
    assert cache.stats().num_free == 60
    assert cache.stats().num_namespaces == 0


class Contents:
    """What pages hold: the tokens that they stand for, written by whoever fills them."""

    def __init__(self, cache: PrefixCache) -> None:
        stats = cache.stats()
        self.size = stats.page_size
        self.slots = np.full((stats.num_pages, self.size), -1, np.int32)

    def fill(self, lease: Lease) -> None:
        """Copy the matching head of the page to copy from, compute the rest, page by page, and publish as it goes."""
        ids, first = lease.tokens.array, lease.num_published // self.size
        partial, head = lease.partial_page, lease.partial_tokens
        for index in range(first, len(lease.pages)):
            page, rows = lease.pages[index], ids[index * self.size : (index + 1) * self.size]
            copied = head if index == first and partial is not None else 0
            self.slots[page, :copied] = self.slots[partial, :copied] if copied else 0
            self.slots[page, copied : len(rows)] = rows[copied:]
            if index % 2:
                lease.commit((index + 1) * self.size if len(rows) == self.size else len(ids))
        lease.commit()

    def verify(self, lease: Lease) -> int:
        """Every page it may read holds the tokens it stands for; returns how many were looked at."""
        ids = lease.tokens.array
        num_cached = lease.num_published // self.size
        for index, page in enumerate(lease.pages[:num_cached]):
            assert self.slots[page].tolist() == ids[index * self.size : (index + 1) * self.size].tolist()
        if lease.partial_page is not None:
            rest = ids[num_cached * self.size :][: lease.partial_tokens]
            assert self.slots[lease.partial_page, : lease.partial_tokens].tolist() == rest.tolist()
        return num_cached


def share_prefixes(num_requests: int, num_threads: int = NUM_THREADS) -> tuple[int, int]:
    """Threads over hot prefixes in a pool that is too small; returns pages verified and requests refused."""
    cache = PrefixCache(40, 4)
    contents = Contents(cache)
    hot = [[first] * 8 + [9] * 5 for first in range(3)]

    def work(number: int) -> tuple[int, int]:
        random, verified, refused = Random(number), 0, 0
        for _ in range(num_requests):
            base = random.choice(hot)
            prompt = base[: random.randrange(len(base) + 1)] + [random.randrange(3) for _ in range(random.randrange(9))]
            with cache.acquire(prompt) as lease:
                verified += contents.verify(lease)
                try:
                    lease.extend()
                except PoolExhausted:
                    refused += 1
                    continue
                contents.fill(lease)
                verified += contents.verify(lease)
        return verified, refused

    results = together(work, num_threads)
    cache.check()
    assert cache.stats().evicted_pages > 200
    return sum(verified for verified, _ in results), sum(refused for _, refused in results)


def test_a_page_that_can_be_read_is_never_overwritten():
    verified, refused = share_prefixes(800)
    assert verified > 10_000
    assert refused < 8 * 800 / 2


def test_threads_that_compute_one_prompt_end_with_one_copy():
    cache = PrefixCache(NUM_THREADS * 10, 2)
    prompt = list(range(20))
    held = Barrier(NUM_THREADS)

    def work(_: int) -> list[int]:
        with cache.acquire(prompt) as lease:
            lease.extend()
            held.wait(60)  # all have acquired before the first publishes
            for end in range(2, 21, 2):
                lease.commit(end)
            return lease.pages.tolist()

    tables = together(work)
    assert all(table == tables[0] for table in tables)
    cache.check()
    assert cache.stats().num_free == NUM_THREADS * 10 - 10


def test_threads_that_append_to_one_cursor_lose_no_token():
    cache = PrefixCache(1300, 4)
    cursor = cache.cursor()

    def work(number: int) -> int:
        added = 0
        for count in range(400):
            try:
                if count % 10 == 5:
                    with cache.acquire(cursor) as lease:
                        lease.extend()
                        lease.commit()
                cursor.append([number] * 3)
                added += 3
            except CursorBusy:  # somebody else's lease: what was not appended is not counted
                pass
        return added

    added = sum(together(work, 4))
    tokens = cursor.tokens.tolist()
    assert len(tokens) == added > 500
    assert all(tokens[index] == tokens[index + 1] == tokens[index + 2] for index in range(0, added, 3))
    with cache.acquire(cursor) as lease:
        assert lease.num_matched == cache.match(cursor.tokens)
    cache.check()
