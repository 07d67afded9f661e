from __future__ import annotations

import sys
from array import array
from random import Random

import numpy as np
import pytest

from radixkv.cache import PrefixCache
from radixkv.errors import (
    ConfigError,
    CursorBusy,
    ForeignLease,
    InvariantError,
    LeaseReleased,
    NamespaceError,
    PoolExhausted,
    TokenRangeError,
    TokenTypeError,
)
from radixkv.events import Evicted, Looked, Released, Removed, Reserved, Stored
from radixkv.namespace import Namespace, digest_fields
from radixkv.policies import POLICIES
from radixkv.tree import RadixTree
from tests.conftest import NATIVE
from tests.core.models import Replayer, resident, snapshot


def fill(cache: PrefixCache, ids, namespace="") -> int:
    """One whole request; how many of its tokens were cached."""
    with cache.acquire(ids, namespace) as lease:
        lease.extend()
        lease.commit()
        return lease.num_matched


def prefixes(cache: PrefixCache) -> set[tuple[int, ...]]:
    return {ids for _, ids in resident(cache)}


# -- the life of a lease -------------------------------------------------------------------------------------------


def test_the_life_of_a_lease():
    cache = PrefixCache(8, 2)
    assert cache.match([1, 2, 3, 4, 5]) == 0
    lease = cache.acquire([1, 2, 3, 4, 5], owner="me")
    assert (lease.num_tokens, lease.num_matched, lease.num_published, lease.partial_page) == (5, 0, 0, None)
    assert lease.pages.tolist() == []
    lease.extend()
    assert lease.pages.tolist() == [0, 1, 2]
    lease.extend([6])  # fits in the page it has
    lease.extend([7, 8])
    assert lease.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert lease.pages.tolist() == [0, 1, 2, 3]
    assert cache.match(lease.tokens) == 0
    assert lease.commit(5) == 0
    assert (lease.num_published, cache.match(lease.tokens)) == (4, 4)
    assert (cache.stats().num_leased, cache.stats().num_locked) == (2, 2)
    assert lease.commit() == 0
    assert lease.num_published == 8
    assert not lease.released
    lease.release()
    assert lease.released
    stats = cache.stats()
    assert (stats.num_free, stats.num_evictable, stats.num_locked, stats.num_leased) == (4, 4, 0, 0)
    again = cache.acquire([1, 2, 3, 4, 5, 6, 9])
    assert (again.num_matched, again.pages.tolist()) == (6, [0, 1, 2])
    again.release()
    cache.check()


def test_slots_come_before_the_tokens_that_go_there():
    cache = PrefixCache(8, 2)
    with cache.acquire([1, 2, 3]) as lease:
        lease.extend(num_spare=4)
        assert (lease.num_tokens, lease.num_own_pages) == (3, 4), "3 tokens and 4 that are not known yet"
        pages = lease.pages.tolist()
        lease.extend(num_spare=2)
        lease.extend([4, 5, 6, 7, 8])
        assert (lease.num_tokens, lease.pages.tolist()) == (8, pages), "they have their slots already"
        with pytest.raises(PoolExhausted):
            lease.extend([9], num_spare=8)
        assert (lease.num_tokens, lease.num_own_pages) == (8, 4)
        lease.commit()
    assert cache.match(range(1, 9)) == 8
    with cache.acquire(b"") as lease:  # slots for tokens that nobody hears of
        lease.extend(num_spare=5)
        assert (lease.num_tokens, lease.num_own_pages, cache.stats().num_leased) == (0, 3, 3)
    assert cache.stats().num_leased == 0
    cache.check()


def test_a_lease_is_a_context_manager_that_releases_once():
    cache = PrefixCache(4, 1)
    with cache.acquire([1, 2]) as lease:
        lease.extend()
    assert lease.released
    with cache.acquire([1, 2]) as lease:
        lease.release()  # early: the end of the block releases nothing again
    lease = cache.acquire([1, 2])
    with pytest.raises(TokenTypeError), lease:
        lease.extend("text")
    assert lease.released
    with pytest.raises(LeaseReleased), lease:
        pass
    assert cache.stats().num_free == 4


def test_unpublished_pages_are_freed_at_release():
    cache = PrefixCache(8, 2)
    with cache.acquire([1, 2, 3, 4, 5]) as lease:
        lease.extend()
        lease.commit(3)
    assert cache.stats().num_free == 7
    assert prefixes(cache) == {(1, 2)}


def test_a_match_that_ends_inside_a_page_names_the_page_to_copy_from():
    cache = PrefixCache(8, 4)
    fill(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    with cache.acquire([1, 2, 3, 4, 5, 6, 9]) as lease:
        assert (lease.num_matched, lease.num_published, lease.partial_tokens, lease.partial_page) == (6, 4, 2, 1)
        assert lease.pages.tolist() == [0]
        lease.extend()
        assert lease.partial_page == 1
        cache.evict(8)
        cache.flush()
        assert resident(cache)[lease.namespace, (1, 2, 3, 4, 5, 6, 7, 8)] == 1  # it stays to be copied from
        lease.extend([9])
        lease.commit()
        assert (lease.partial_page, lease.partial_tokens) == (None, 0)
        assert cache.evict(8) == 1  # and is free to go after the first commit
    cache.check()


def test_who_forgot_a_lease_is_named():
    cache = PrefixCache(4, 1)
    first, second = cache.acquire([1], owner="a"), cache.acquire([1], owner="b")
    assert [lease.owner for lease in cache.leases()] == ["a", "b"]
    assert first.id != second.id
    assert "'a'" in repr(first)
    first.release()
    assert cache.leases() == (second,)
    assert "released" in repr(first)


def test_an_empty_prompt_has_a_lease_too():
    cache = PrefixCache(4, 2)
    with cache.acquire([]) as lease:
        assert (lease.num_tokens, lease.num_matched, lease.pages.tolist()) == (0, 0, [])
        lease.extend()
        assert lease.commit() == 0
        lease.extend([1, 2, 3])
        lease.commit()
    assert prefixes(cache) == {(1, 2)}


def test_a_page_table_in_hand_does_not_change_under_its_reader():
    cache = PrefixCache(8, 1)
    first, second = cache.acquire([1, 2]), cache.acquire([1, 2])
    first.extend()
    second.extend()
    table = second.pages
    first.commit()
    second.extend([3])
    second.commit()
    assert table.tolist() == [2, 3]
    assert second.pages.tolist() == [0, 1, 4]


# -- progressive commit, and two that compute the same ----------------------------------------------------------------


def test_another_request_attaches_to_pages_while_the_first_still_fills():
    cache = PrefixCache(16, 2)
    prompt = list(range(10))
    first = cache.acquire(prompt)
    first.extend()
    first.commit(4)
    second = cache.acquire(prompt)
    assert (second.num_matched, second.pages.tolist()) == (4, [0, 1])
    first.commit(8)
    third = cache.acquire(prompt)
    assert (third.num_matched, third.pages.tolist()) == (8, [0, 1, 2, 3])
    first.release()
    assert cache.evict(16) == 0  # all of it is leased
    third.release()
    assert cache.evict(16) == 2
    second.release()
    cache.check()


def test_two_that_compute_the_same_pages_end_with_one_copy():
    cache = PrefixCache(12, 2)
    assert cache.generation(0) == 0  # frees are counted from here on
    prompt = [1, 2, 3, 4, 5, 6, 7]
    first, second = cache.acquire(prompt), cache.acquire(prompt)
    first.extend()
    second.extend()
    assert (first.pages.tolist(), second.pages.tolist()) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert first.commit(4) == 0
    assert second.commit(6) == 2
    assert second.pages.tolist() == [0, 1, 6, 7]  # two are the other's now, one is published, one unfinished
    assert first.commit() == 1
    assert first.pages.tolist() == [0, 1, 6, 3]
    assert second.commit() == 0
    assert cache.stats().num_free == 12 - 3 - 2
    assert [cache.generation(page) for page in (2, 4, 5)] == [1, 1, 1]
    cache.check()
    first.release()
    second.release()
    assert cache.stats().num_free == 9
    cache.check()


def test_a_branch_published_meanwhile_is_shared_as_far_as_it_agrees():
    cache = PrefixCache(16, 1)
    slow = cache.acquire([1, 2, 3, 4])
    slow.extend()
    fill(cache, [1, 2, 9, 9])
    assert slow.commit() == 2
    assert prefixes(cache) == {(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (1, 2, 9), (1, 2, 9, 9)}
    slow.release()
    cache.check()


# -- errors leave no trace -----------------------------------------------------------------------------------------


def crowded() -> tuple[PrefixCache, list]:
    """Leases in every state over a full pool: whole match, inside an edge, inside a page, half published, on a cursor."""
    cache = PrefixCache(14, 2)
    fill(cache, [1, 1, 2, 2, 3, 3, 4, 4])
    fill(cache, [5, 5, 6, 6])
    whole = cache.acquire([5, 5, 6, 6])
    inside_edge = cache.acquire([1, 1, 2, 2, 9, 9])
    inside_page = cache.acquire([1, 1, 2, 2, 3, 8])
    filling = cache.acquire([7, 7, 8, 8, 9])
    filling.extend()
    filling.commit(2)
    cursor = cache.cursor(tokens=[7, 7, 1])
    over_cursor = cache.acquire(cursor)
    over_cursor.extend()
    cache.check()
    return cache, [whole, inside_edge, inside_page, filling, over_cursor, cursor]


def test_a_pool_that_is_too_small_is_named_and_nothing_has_changed():
    cache, (whole, inside_edge, inside_page, filling, over_cursor, cursor) = crowded()
    before, text = snapshot(cache), repr(cursor)
    for lease in (whole, inside_edge, inside_page, filling, over_cursor):
        with pytest.raises(PoolExhausted) as caught:
            lease.extend([3] * 40)
        error = caught.value
        gives_up = lease is inside_page  # the page it would copy from
        assert (error.free, error.evictable, error.leased) == (4, 1 + gives_up, 3)
        assert error.needed > error.free + error.evictable
        assert str(error.needed) in str(error)
        assert snapshot(cache) == before
        assert repr(cursor) == text
    cache.check()
    inside_edge.extend([9] * 6)  # 5 pages: the 4 that are free, and the one that can be evicted
    assert cache.stats().num_free == 0
    cache.check()


@pytest.mark.parametrize("quota", [None, 4])
def test_a_request_that_fits_is_not_kept_out_by_the_page_it_would_copy_from(quota):
    cache = PrefixCache(4 if quota is None else 50, 2)
    if quota is not None:
        cache.set_quota("", max_pages=quota)
    fill(cache, range(8))
    with cache.acquire([0, 50, 51, 52, 53, 54, 55, 56]) as lease:
        assert (lease.num_matched, lease.partial_tokens) == (1, 1)
        lease.extend()
        assert (lease.num_matched, lease.partial_tokens, lease.partial_page) == (0, 0, None)
        lease.commit()
        cache.check()
    assert cache.match([0, 50, 51, 52, 53, 54, 55, 56]) == 8


def test_a_page_to_copy_from_is_kept_where_giving_it_up_would_not_help():
    cache = PrefixCache(4, 2)
    fill(cache, range(8))
    lease = cache.acquire([0, 1, 2, 3, 4, 90])
    assert (lease.num_matched, lease.partial_tokens) == (5, 1)
    before = snapshot(cache)
    with pytest.raises(PoolExhausted):
        lease.extend([7] * 6)
    assert snapshot(cache) == before
    assert (lease.num_matched, lease.partial_tokens) == (5, 1)
    cache.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_tag_is_a_number_or_refused_before_anything_is_leased(policy):
    cache = PrefixCache(8, 2, policy=policy)
    for bad in ("x", None, [1], float("nan")):
        with pytest.raises(ConfigError) as caught:
            cache.acquire([1, 2, 3, 4], tag=bad)
        assert caught.value.setting == "tag"
    assert cache.leases() == ()
    for odd in (np.uint8(9), -3, 10**9):
        with cache.acquire([1, 2, 3, 4], tag=odd) as lease:
            lease.extend()
            lease.commit()
    cache.check()


BAD_CALLS = {
    "commit more than there is": (lambda c, s: s[3].commit(6), ConfigError),
    "commit more than has pages": (lambda c, s: s[1].commit(6), ConfigError),
    "commit a part of a page that does not exist": (lambda c, s: s[1].commit(5), ConfigError),
    "commit a negative number": (lambda c, s: s[3].commit(-1), ConfigError),
    "commit half a page": (lambda c, s: s[3].commit(3.0), ConfigError),
    "acquire with half a limit": (lambda c, s: c.acquire([1, 1, 2, 2, 3], limit=4.0), ConfigError),
    "evict half a page": (lambda c, s: c.evict(1.5), ConfigError),
    "truncate by half": (lambda c, s: s[5].truncate(1.0), ConfigError),
    "extend by a negative id": (lambda c, s: s[3].extend([1, -1]), TokenRangeError),
    "extend by fewer slots than none": (lambda c, s: s[3].extend(num_spare=-1), ConfigError),
    "extend by half a slot": (lambda c, s: s[3].extend(num_spare=0.5), ConfigError),
    "extend by text": (lambda c, s: s[3].extend("text"), TokenTypeError),
    "acquire floats": (lambda c, s: c.acquire([1.5]), TokenTypeError),
    "acquire in no namespace": (lambda c, s: c.acquire([1], None), NamespaceError),
    "acquire in a namespace of bytes": (lambda c, s: c.acquire([1], b"tenant"), NamespaceError),
    "acquire with a salt too long": (lambda c, s: c.acquire([1], "x" * 1025), NamespaceError),
    "acquire with a salt that is a number": (lambda c, s: c.acquire([1], Namespace(5)), NamespaceError),
    "acquire with a salt that is a list": (lambda c, s: c.acquire([1], Namespace(["a"])), NamespaceError),
    "acquire with a fingerprint of bytes": (lambda c, s: c.acquire([1], Namespace("", b"f")), NamespaceError),
    "match text": (lambda c, s: c.match("text"), TokenTypeError),
    "match in no namespace": (lambda c, s: c.match([1], 3), NamespaceError),
    "remove text": (lambda c, s: c.remove("text"), TokenTypeError),
    "remove in no namespace": (lambda c, s: c.remove([1], None), NamespaceError),
    "a cursor in no namespace": (lambda c, s: c.cursor(None), NamespaceError),
    "a cursor of text": (lambda c, s: c.cursor(tokens="text"), TokenTypeError),
    "acquire a busy cursor": (lambda c, s: c.acquire(s[5]), CursorBusy),
    "append to a busy cursor": (lambda c, s: s[5].append([1]), CursorBusy),
    "truncate a busy cursor": (lambda c, s: s[5].truncate(0), CursorBusy),
    "acquire another cache's cursor": (lambda c, s: c.acquire(PrefixCache(2, 2).cursor()), ForeignLease),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_named_and_leaves_no_trace(case):
    cache, state = crowded()
    call, error = BAD_CALLS[case]
    before, text = snapshot(cache), repr(state[5])
    with pytest.raises((error, TypeError)) as caught:  # compiled code refuses a wrong type before ours can name it
        call(cache, state)
    assert isinstance(caught.value, error) or (NATIVE and "expected; got" in str(caught.value))
    assert not isinstance(caught.value, error) or caught.value.fields
    assert snapshot(cache) == before
    assert repr(state[5]) == text
    cache.check()


def test_a_released_lease_can_do_nothing_and_keeps_nothing():
    cache = PrefixCache(4, 1)
    lease = cache.acquire([1, 2])
    lease.extend()
    lease.release()
    before = snapshot(cache)
    for use in (lease.release, lease.extend, lease.commit, lambda: lease.pages, lease.__enter__):
        with pytest.raises(LeaseReleased) as caught:
            use()
        assert caught.value.lease_id == lease.id
    assert snapshot(cache) == before
    cache.check()


def test_a_busy_cursor_names_the_lease_over_it():
    cache = PrefixCache(4, 1)
    cursor = cache.cursor(tokens=[1])
    assert not cursor.leased
    lease = cache.acquire(cursor)
    assert cursor.leased
    with pytest.raises(CursorBusy) as caught:
        cache.acquire(cursor)
    assert caught.value.lease_id == lease.id
    lease.release()
    assert not cursor.leased
    cache.acquire(cursor).release()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"num_pages": 0}, "num_pages"),
        ({"num_pages": 4.0}, "num_pages"),
        ({"num_pages": 4, "page_size": 2.5}, "page_size"),
        ({"num_pages": 4, "page_size": "16"}, "page_size"),
        ({"num_pages": 4, "page_size": 0}, "page_size"),
        ({"num_pages": 4, "page_size": -1}, "page_size"),
        ({"num_pages": 4, "policy": "best"}, "policy"),
    ],
)
def test_a_bad_setting_is_named(settings, name):
    with pytest.raises(ConfigError) as caught:
        PrefixCache(**settings)
    assert caught.value.setting == name


def test_numbers_may_be_numpys():
    cache = PrefixCache(np.int64(8), np.int32(2))
    cursor = cache.cursor(tokens=[1, 2, 3, 4, 5])
    with cache.acquire(cursor, limit=np.int64(4)) as lease:
        lease.extend()
        lease.commit(np.int64(4))
        assert type(lease.num_published) is int
    cursor.truncate(np.int64(3))
    assert cache.acquire(cursor).num_matched == 3
    assert cache.evict(np.int64(1)) == 0
    cache.check()


def test_a_truncate_beyond_the_sequence_is_named():
    cursor = PrefixCache(4, 1).cursor(tokens=[1, 2])
    for num_tokens in (-1, 3):
        with pytest.raises(ConfigError):
            cursor.truncate(num_tokens)
    assert cursor.tokens.tolist() == [1, 2]


# -- eviction ------------------------------------------------------------------------------------------------------


class PageLru:
    """Every page its own node: a dict from prefix to the tick of its last use. The oldest leaf goes, deeper first."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size, self.tick = num_pages, page_size, 0
        self.used: dict[tuple[int, ...], int] = {}

    def request(self, ids: tuple[int, ...]) -> None:
        size = self.page_size
        paths = [ids[:end] for end in range(size, len(ids) + 1, size)]
        cached = [path for path in paths if path in self.used]
        matched = cached[: (len(ids) - 1) // size]  # the last token is computed
        held, end = set(matched), len(matched) * size
        if end < len(ids) - 1:  # and the page in which the match ends is held too: a page is one token, again and again
            held |= {ids[:end] + ids[end : end + 1] * size} & self.used.keys()
        needed = -(-len(ids) // size) - len(matched)
        if needed <= self.num_pages - len(held):
            while self.num_pages - len(self.used) < needed:
                leaves = [
                    path
                    for path in self.used
                    if path not in held and not any(len(o) == len(path) + size and o[: len(path)] == path for o in self.used)
                ]
                del self.used[min(leaves, key=lambda path: (self.used[path], -len(path)))]
            matched = paths
        self.tick += 1
        self.used.update(dict.fromkeys(matched, self.tick))


@pytest.mark.parametrize(("num_pages", "page_size"), [(3, 1), (8, 1), (8, 4), (24, 2), (60, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_lru_keeps_exactly_the_pages_that_a_page_level_lru_keeps(num_pages, page_size, seed):
    random, cache, model = Random(seed), PrefixCache(num_pages, page_size), PageLru(num_pages, page_size)
    earlier: list[tuple[int, ...]] = [()]
    refused = 0
    for _ in range(400):
        base = random.choice(earlier[-30:])
        base = base[: random.randrange(len(base) // page_size + 1) * page_size] if random.random() < 0.6 else base
        ids = base[: 8 * page_size]
        for _ in range(random.randrange(1, 4)):
            ids += (random.randrange(4),) * page_size  # siblings share no head: no page to copy from but their own
        earlier.append(ids)
        ids = ids[: len(ids) - random.choice((0, 0, random.randrange(page_size)))]
        with cache.acquire(ids, limit=len(ids) - 1) as lease:
            try:
                lease.extend()
                lease.commit()
            except PoolExhausted:
                refused += 1
        model.request(ids)
        assert prefixes(cache) == set(model.used)
    cache.check()
    assert cache.stats().evicted_pages > 100
    assert refused < 330


def test_what_a_lease_does_not_use_of_an_edge_is_evicted_in_its_turn():
    cache = PrefixCache(6, 1)
    fill(cache, [1, 2, 3, 4])
    fill(cache, [8, 9])
    with cache.acquire([1, 5, 6]) as lease:  # ends inside the edge 1 2 3 4, and needs two pages
        lease.extend()
        lease.commit()
    assert prefixes(cache) == {(1,), (1, 2), (1, 5), (1, 5, 6), (8,), (8, 9)}
    cache.check()


def test_evict_takes_no_more_than_asked_and_no_less_than_it_can():
    cache = PrefixCache(10, 1)
    fill(cache, [1, 2, 3, 4])
    fill(cache, [8, 9])
    lease = cache.acquire([1, 2])
    assert cache.evict(0) == 0
    assert cache.evict(-3) == 0
    assert cache.evict(1) == 1
    assert prefixes(cache) == {(1,), (1, 2), (1, 2, 3), (8,), (8, 9)}
    assert cache.evict(100) == 3
    assert prefixes(cache) == {(1,), (1, 2)}
    lease.release()
    assert cache.evict(100) == 2
    assert cache.stats().evicted_pages == 6
    assert cache.stats().num_free == 10
    cache.check()


def test_a_lease_over_a_match_delays_no_eviction_once_it_is_narrowed():
    cache = PrefixCache(40, 1)
    fill(cache, list(range(20)))
    leases = [cache.acquire([*range(length), 99]) for length in (3, 11, 7, 0, 20)]
    assert cache.evict(100) == 0  # one of them holds it all
    leases.pop().release()
    for expected in (9, 4, 4):
        assert cache.evict(100) == expected
        max(leases, key=lambda lease: lease.num_matched).release()
        leases.remove(max(leases, key=lambda lease: lease.num_matched))
        cache.check()
    assert cache.evict(100) == 3
    assert cache.stats().num_free == 40


# -- remove and flush ----------------------------------------------------------------------------------------------


def test_remove_forgets_what_continues_a_prefix():
    cache = PrefixCache(20, 2)
    for tail in ([5, 5], [6, 6], [5, 6]):
        fill(cache, [1, 1, 2, 2, *tail])
    fill(cache, [9, 9])
    assert sorted(cache.remove([1, 1, 2, 2, 5]).pages) == [2, 4]  # inside a page: those that begin so
    assert cache.match([1, 1, 2, 2, 5, 5]) == 4
    assert cache.remove([1, 1, 2, 3]).pages.tolist() == []
    assert cache.remove([7]).pages.tolist() == []
    assert cache.remove([1, 1], "nobody").pages.tolist() == []
    assert sorted(cache.remove([1, 1]).pages) == [1, 3]  # 1 1 itself stays
    assert cache.match([1, 1, 2, 2]) == 2
    assert sorted(cache.remove().pages) == [0, 5]
    assert cache.stats().num_free == 20
    assert cache.stats().num_namespaces == 0
    cache.check()


def test_what_leases_hold_stays_and_is_counted():
    cache = PrefixCache(20, 1)
    fill(cache, [1, 2, 3, 4, 5])
    fill(cache, [1, 2, 7])
    lease = cache.acquire([1, 2, 3, 9])  # holds 1 2 3 and not what follows, though it is one edge
    removal = cache.remove([1])
    assert (len(removal.pages), removal.num_locked) == (3, 2)
    assert prefixes(cache) == {(1,), (1, 2), (1, 2, 3)}
    lease.extend()
    lease.commit()
    assert cache.flush() == 4
    lease.release()
    assert cache.flush() == 0
    assert cache.show() == "(empty)"
    cache.check()


def test_a_lease_goes_on_after_what_followed_it_was_removed():
    cache = PrefixCache(20, 2)
    fill(cache, [1, 1, 2, 2, 3, 3])
    lease = cache.acquire([1, 1, 2, 2, 3, 4])
    cache.flush()
    lease.extend([5, 5])
    assert lease.commit() == 0
    assert lease.pages.tolist()[:2] == [0, 1]
    lease.release()
    assert cache.match([1, 1, 2, 2, 3, 4, 5, 5]) == 8
    cache.check()


# -- namespaces ----------------------------------------------------------------------------------------------------


def test_the_same_tokens_under_another_salt_or_fingerprint_never_hit():
    cache, ids = PrefixCache(64, 2, fingerprint="weights-1"), [1, 2, 3, 4]
    names = [
        "",
        "a",
        "b",
        Namespace("a", "weights-2"),
        Namespace("a", ""),
        Namespace("", "weights-2"),
        Namespace("weights-1", ""),
        Namespace("aweights-1", ""),
        Namespace("", "aweights-1"),
        Namespace("\ud800", "weights-1"),
        Namespace("?", "weights-1"),
    ]
    assert len({cache.acquire(ids, name).namespace for name in names}) == len(names)
    for lease in cache.leases():
        lease.release()
    for index, name in enumerate(names):
        for other in names[index:]:
            assert cache.match(ids, other) == 0
            assert cache.match(ids[:1], other) == 0
        assert fill(cache, ids, name) == 0
        assert cache.match(ids, name) == 4
    assert cache.stats().num_namespaces == len(names)
    assert len(set(resident(cache).values())) == 2 * len(names)
    cache.check()
    assert len(cache.remove([], "a").pages) == 2
    assert cache.match(ids, "a") == 0
    assert cache.match(ids, "b") == 4


def test_a_caches_fingerprint_is_part_of_a_plain_salt():
    cache = PrefixCache(8, 2, fingerprint="weights-1")
    fill(cache, [1, 2], "a")
    assert cache.match([1, 2], Namespace("a", "weights-1")) == 2
    assert cache.match([1, 2], Namespace("a", "")) == 0
    assert cache.namespace_key("a") == cache.namespace_key(Namespace("a", "weights-1")) == Namespace("a", "weights-1").key
    with cache.acquire(cache.cursor("a", [1, 2])) as lease:
        assert lease.num_matched == 2
    with cache.acquire(cache.cursor(Namespace("a"), [1, 2]), "a") as lease:  # a cursor brings its own
        assert lease.num_matched == 0


def test_fields_of_a_digest_never_run_together():
    assert digest_fields(b"ab", b"c") != digest_fields(b"a", b"bc")
    assert digest_fields(b"a") != digest_fields(b"a", b"")
    assert len(digest_fields()) == len(Namespace("x").key) == 32
    assert Namespace("x").key == digest_fields(b"x", b"")


def test_a_namespace_of_no_pages_and_no_leases_is_forgotten():
    cache = PrefixCache(8, 1)
    for number in range(100):
        cache.acquire([1, 2], f"tenant {number}").release()
        cache.match([1], f"other {number}")
    assert cache.stats().num_namespaces == 0


# -- limit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 3, 4])
def test_a_limit_shortens_the_match_and_nothing_else(page_size):
    cache = PrefixCache(64, page_size)
    fill(cache, list(range(24)))
    fill(cache, [*range(12), 99, 98, 97, 96])
    fill(cache, [*range(24), *range(50, 62)])
    query = [*range(24), *range(50, 61)]
    for prompt in (query, query[:20], [*range(12), 99, 98, 97, 5], [*range(13), 5, 5, 5]):
        full = cache.match(prompt)
        whole = cache.acquire(prompt)
        for limit in (*range(-2, full + 3), None):
            before = cache.show()
            lease = cache.acquire(prompt, limit=limit)
            expected = full if limit is None else min(full, max(limit, 0))
            assert lease.num_matched == expected
            assert lease.num_published == expected // page_size * page_size
            assert lease.partial_tokens == expected % page_size
            assert lease.pages == whole.pages[: expected // page_size]
            if expected % page_size and expected // page_size < len(whole.pages):
                assert lease.partial_page == whole.pages[expected // page_size]
            assert (lease.partial_page is None) == (expected % page_size == 0)
            assert cache.show().replace(" locks 1", "").replace(" locks 2", "") == before.replace(" locks 1", "")
            cache.check()
            lease.release()
        whole.release()


def test_with_a_limit_at_least_one_token_is_always_computed():
    cache = PrefixCache(16, 4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    fill(cache, prompt)
    with cache.acquire(prompt, limit=len(prompt) - 1) as lease:
        assert (lease.num_matched, lease.partial_page) == (7, 1)
        lease.extend()
        assert lease.commit() == 1  # what it computed again was there
        assert lease.pages.tolist() == [0, 1]
    assert cache.stats().num_free == 14


# -- cursors -------------------------------------------------------------------------------------------------------


def test_a_cursor_is_found_where_its_lease_ended():
    cache = PrefixCache(16, 2)
    cursor = cache.cursor(tokens=[1, 2, 3])
    assert cursor.num_tokens == 3
    with cache.acquire(cursor) as lease:
        assert lease.num_matched == 0
        lease.extend([4, 5])  # the answer: it is the cursor's too
        lease.commit()
    assert cursor.tokens.tolist() == [1, 2, 3, 4, 5]
    assert cursor.tail(2).tolist() == [4, 5]
    assert cursor.tail(0).tolist() == []
    assert cursor.tail(99).tolist() == [1, 2, 3, 4, 5]
    cursor.append(np.array([6, 7]))
    with cache.acquire(cursor) as lease:
        assert (lease.num_matched, lease.num_tokens, lease.pages.tolist()) == (4, 7, [0, 1])


@pytest.mark.parametrize("seed", range(6))
def test_a_cursor_finds_what_a_fresh_lookup_of_its_tokens_finds(seed):
    """After truncate, fork, eviction, flush, and other conversations over the same prefixes."""
    random, cache = Random(seed), PrefixCache(24, 2)
    cursors = [cache.cursor() for _ in range(3)]
    compared = 0
    for _ in range(1500):
        cursor = random.choice(cursors)
        action = random.randrange(12)
        if cursor.num_tokens > 30:
            cursor.truncate(12)
        elif action < 3:
            cursor.append([random.randrange(2) for _ in range(random.randrange(6))])
        elif action == 3:
            cursor.truncate(random.randrange(cursor.num_tokens + 1))
        elif action == 4:
            cursors[random.randrange(3)] = cursor.fork()
        elif action == 5:
            cache.evict(random.randrange(4))
        elif action == 6 and random.random() < 0.1:
            cache.flush()
        elif action == 7:
            cache.remove(cursor.tokens[: random.randrange(cursor.num_tokens + 1)])
        else:
            limit = random.choice((None, None, random.randrange(20)))
            expected = cache.match(cursor.tokens)
            with cache.acquire(cursor, limit=limit) as lease, cache.acquire(cursor.tokens, limit=limit) as fresh:
                assert lease.num_matched == fresh.num_matched
                assert lease.num_matched == (expected if limit is None else min(expected, limit))
                assert lease.pages == fresh.pages
                assert lease.partial_tokens == fresh.partial_tokens
                compared += lease.num_matched > 0
                fresh.release()
                lease.extend([random.randrange(2) for _ in range(random.randrange(4))])
                lease.commit(max(lease.num_published, lease.num_tokens - random.randrange(3)))
        cache.check()
    assert compared >= 100


def test_forks_share_pages_and_go_their_own_ways():
    cache = PrefixCache(16, 1)
    cursor = cache.cursor(tokens=[1, 2, 3])
    with cache.acquire(cursor) as lease:
        other = cursor.fork()  # while its lease is live: from where it was before
        lease.extend()
        lease.commit()
    third = cursor.fork()
    other.append([7])
    third.append([8])
    for fork in (other, third):
        with cache.acquire(fork) as lease:
            assert lease.num_matched == 3
            lease.extend()
            lease.commit()
    assert cursor.tokens.tolist() == [1, 2, 3]
    assert cache.stats().num_evictable == 5
    cache.check()


def test_a_cursor_does_not_trust_a_leaf_that_lost_its_end_and_got_another():
    cache = PrefixCache(8, 1)
    cursor = cache.cursor(tokens=[1, 2, 3, 4])
    with cache.acquire(cursor) as lease:
        lease.extend()
        lease.commit()
    assert cache.evict(1) == 1
    fill(cache, [1, 2, 3, 9])
    with cache.acquire(cursor) as lease:
        assert lease.num_matched == 3
        assert lease.pages == cache.acquire([1, 2, 3]).pages


def test_a_cursor_outlives_its_whole_namespace():
    cache = PrefixCache(8, 1)
    cursor = cache.cursor("a", [1, 2])
    with cache.acquire(cursor) as lease:
        lease.extend()
        lease.commit()
    cache.flush()
    assert cache.stats().num_namespaces == 0
    cursor.fork()
    assert cache.stats().num_namespaces == 0
    with cache.acquire(cursor) as lease:
        assert lease.num_matched == 0
        lease.extend()
        lease.commit()
    fill(cache, [1, 2, 3], "a")
    cursor.append([3])
    with cache.acquire(cursor) as lease:
        assert lease.num_matched == 3
    cache.check()


class Steps:
    """Lines of radixkv executed inside the block: the operations it took, on any machine."""

    count = 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def trace(self, frame, event, _):
        if "radixkv" not in frame.f_code.co_filename:
            return None
        self.count += event == "line"
        return self.trace


@pytest.mark.pure
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_turn_over_a_cursor_costs_the_same_whatever_the_history(page_size, monkeypatch):
    tails, real = [], RadixTree.match
    monkeypatch.setattr(
        RadixTree, "match", lambda self, node, position, tail: (tails.append(len(tail)), real(self, node, position, tail))[1]
    )
    costs = {}
    for history in (10, 1_000, 30_000):
        cache = PrefixCache(2 * history + 100, page_size)
        cursor = cache.cursor(tokens=range(history * page_size))
        for turn in range(4):
            tails.clear()
            cursor.append([turn] * (2 * page_size))
            with Steps() as steps:
                lease = cache.acquire(cursor)
                lease.extend([5] * page_size)
                lease.commit()
                lease.release()
        assert lease.num_matched == (history + 9) * page_size
        costs[history] = steps.count, max(tails)
    assert costs[10] == costs[1_000] == costs[30_000]
    assert costs[10][1] == 2 * page_size * 4  # bytes: the new tokens of the look-up; the insert goes on from there
    assert costs[10][0] < 300


@pytest.mark.pure
def test_a_lookup_costs_by_nodes_not_by_tokens():
    costs = []
    for length in (100, 100_000):
        cache = PrefixCache(length, 1)
        fill(cache, range(length))
        with Steps() as steps:
            cache.acquire(range(length)).release()
        costs.append(steps.count)
    assert costs[0] == costs[1]


# -- events --------------------------------------------------------------------------------------------------------


def test_every_action_emits_its_event():
    events = []
    cache = PrefixCache(4, 2, on_event=events.append)
    key = Namespace("a").key

    def emitted():
        seen = list(events)
        events.clear()
        return seen

    first = cache.acquire([1, 2, 3, 4, 5], "a", owner="me")
    assert emitted() == [Looked(1, key, first.id, "me", 5, 0)]
    first.extend()
    assert emitted() == [Reserved(2, first.id, first.pages)]
    first.extend()
    first.commit(1)
    cache.match([1, 2])
    cache.remove([1])
    assert emitted() == []
    first.commit()
    (stored,) = emitted()
    data = np.array([1, 2, 3, 4], np.int32).tobytes()
    assert stored == Stored(3, key, first.id, 0, data, 0, first.pages[:2])
    first.release()
    assert emitted() == [Released(4, key, first.id, 5, 1)]
    second = cache.acquire([1, 2, 9, 9, 8, 8], "a", limit=3)
    second.extend()
    assert emitted() == [Looked(5, key, second.id, "", 6, 2), Reserved(6, second.id, second.pages[1:])]
    third = cache.acquire([7, 7], "b")
    third.extend()
    _, evicted, reserved = emitted()
    assert evicted == Evicted(8, key, 1, array("i", [1]), 4)  # the page that the second did not use
    assert reserved == Reserved(9, third.id, array("i", [1]))
    third.release()
    second.commit(4)
    emitted()
    removal = cache.remove((), "a")
    (removed,) = emitted()
    assert removed == Removed(removed.tick, key, removal.pages, 2)
    second.release()
    emitted()
    removal = cache.remove([1, 2], "a")
    (removed,) = emitted()
    assert removed == Removed(removed.tick, key, removal.pages, 0)
    assert len(removal.pages) == 1
    cache.flush()
    assert [(event.namespace, event.num_locked) for event in emitted()] == [(key, 0)]


def test_an_eviction_tells_where_on_its_path_it_took_pages():
    events = []
    cache = PrefixCache(10, 1, on_event=events.append)
    fill(cache, [1, 2, 3, 4, 5])
    fill(cache, [1, 2, 7])
    events.clear()
    pages = resident(cache)
    key = Namespace("").key
    cache.evict(2)
    cache.evict(1)
    cache.evict(3)
    assert [(event.start, event.pages.tolist()) for event in events] == [
        (3, [pages[key, (1, 2, 3, 4)], pages[key, (1, 2, 3, 4, 5)]]),
        (2, [pages[key, (1, 2, 3)]]),
        (2, [pages[key, (1, 2, 7)]]),
        (0, [pages[key, (1,)], pages[key, (1, 2)]]),
    ]
    assert all(isinstance(event, Evicted) for event in events)


@pytest.mark.parametrize("seed", range(4))
def test_the_events_alone_tell_where_every_page_is(seed):
    """And at every event all invariants hold: a reader may look at the cache from inside it."""
    random = Random(seed)
    replayer = Replayer(20, 2)
    kinds = set()

    def sink(event):
        replayer(event)
        kinds.add(type(event))
        cache.check()
        assert sorted(replayer.free) == cache._allocator.pool.free_pages()

    cache = PrefixCache(20, 2, on_event=sink)
    leases = []
    for _ in range(500):
        action = random.randrange(9)
        ids = [random.randrange(2) for _ in range(random.randrange(16))]
        if action < 3 and len(leases) < 4:
            leases.append(cache.acquire(ids, random.choice(("", "", "b"))))
        elif action < 5 and leases:
            lease = random.choice(leases)
            try:
                lease.extend([random.randrange(2) for _ in range(random.randrange(4))])
                lease.commit(random.randrange(lease.num_published, lease.num_tokens + 1))
            except PoolExhausted:
                pass
        elif action < 7 and leases:
            leases.pop(random.randrange(len(leases))).release()
        elif action == 7:
            cache.evict(random.randrange(3))
        elif random.random() < 0.3:
            cache.remove(ids[:2])
        replayer.check(cache)
    assert kinds == {Looked, Reserved, Stored, Released, Evicted, Removed}
    for lease in leases:
        lease.release()
    cache.flush()
    assert len(replayer.free) == 20
    assert not replayer.tree
    assert not replayer.leased


@pytest.mark.parametrize("kind", [Looked, Reserved, Stored, Released, Evicted, Removed])
def test_a_reader_that_raises_loses_no_page(kind):
    def sink(event):
        if armed and isinstance(event, kind):
            raise ZeroDivisionError

    armed = False
    cache = PrefixCache(6, 1, on_event=sink)
    fill(cache, [9, 8, 7])
    armed = True
    try:
        lease = cache.acquire([1, 2, 3, 4, 5])
        lease.extend()
        lease.commit()
        lease.release()
        cache.flush()
    except ZeroDivisionError:
        armed = False
    assert not armed
    cache.check()
    for lease in cache.leases():
        lease.release()
    cache.flush()
    assert cache.stats().num_free == 6


# -- counts --------------------------------------------------------------------------------------------------------


def test_cached_and_computed_tokens_are_the_prompts_tokens():
    cache, computed = PrefixCache(64, 4), 0
    random = Random(5)
    for _ in range(200):
        prompt = [random.randrange(2) for _ in range(random.randrange(1, 30))]
        with cache.acquire(prompt, limit=len(prompt) - 1) as lease:
            assert 0 <= lease.num_matched < len(prompt)
            computed += len(prompt) - lease.num_matched
            lease.extend()
            lease.commit()
    stats = cache.stats()
    assert stats.hit_tokens + computed == stats.lookup_tokens
    assert stats.hit_rate == stats.hit_tokens / stats.lookup_tokens > 0.2
    assert stats.lookups == 200
    assert PrefixCache(1).stats().hit_rate == 0.0


def test_a_match_touches_nothing_not_even_recency():
    cache = PrefixCache(4, 1)
    fill(cache, [1, 2])
    fill(cache, [3, 4])
    before = snapshot(cache)
    for _ in range(5):
        assert cache.match([1, 2, 3]) == 2
        assert cache.match([1, 2], "nobody") == 0
    assert snapshot(cache) == before
    cache.evict(2)
    assert prefixes(cache) == {(3,), (3, 4)}


def test_a_generation_tells_that_a_page_was_given_away():
    cache = PrefixCache(2, 1)
    fill(cache, [1, 2])
    before = [cache.generation(page) for page in (0, 1)]
    fill(cache, [1, 3])
    assert [cache.generation(page) - old for page, old in zip((0, 1), before, strict=True)] == [0, 1]
    assert cache.generations([1, 0, 1]).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda cache, lease: cache._allocator.pool._free.append(0), "I1"),
        (lambda cache, lease: lease._own.pop(), "I1"),
        (lambda cache, lease: lease._own.append(0), "I1"),
        (lambda cache, lease: setattr(lease._node.account, "num_leased", 9), "I4"),
        (lambda cache, lease: setattr(lease._node.account, "num_evictable", 9), "I4"),
        (lambda cache, lease: setattr(cache._leasing, "num_leased", 9), "I4"),
        (lambda cache, lease: cache._tree.lock(lease._node), "I7"),
        (lambda cache, lease: setattr(lease, "_published", 3), "I7"),
        (lambda cache, lease: cache._allocator.policy.discard(cache._allocator.policy.victim()), "I5"),
        (lambda cache, lease: cache._allocator.policy.add(lease._node), "I5"),
    ],
)
def test_check_names_the_invariant_that_is_broken(spoil, name):
    cache = PrefixCache(12, 1)
    fill(cache, [5, 6])
    lease = cache.acquire([1, 2, 3, 4])
    lease.extend()
    lease.commit(2)
    cache.check()
    spoil(cache, lease)
    with pytest.raises(InvariantError) as caught:
        cache.check()
    assert caught.value.invariant == name
