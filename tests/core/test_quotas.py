from __future__ import annotations

import pytest

from radixkv.cache import PrefixCache
from radixkv.errors import ConfigError, InvariantError, PoolExhausted, QuotaExceeded
from radixkv.namespace import Namespace
from radixkv.policies import POLICIES, Levels
from radixkv.quota import Quota
from radixkv.retention import Retain
from tests.core.models import resident, snapshot


def fill(cache: PrefixCache, ids, namespace="", retention=()) -> int:
    """One whole request; how many of its tokens were cached."""
    with cache.acquire(ids, namespace, retention=retention) as lease:
        lease.extend()
        lease.commit()
        return lease.num_matched


def held(cache: PrefixCache, namespace: str) -> int:
    usage = cache.usage(namespace)
    return usage.num_pages + usage.num_leased


# -- quotas -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_namespace_never_holds_more_than_its_quota_and_evicts_only_its_own(policy):
    cache = PrefixCache(32, 1, policy=policy)
    fill(cache, range(8), "quiet")
    cache.set_quota("noisy", 6)
    for index in range(50):
        with cache.acquire(range(index * 10, index * 10 + 4), "noisy") as lease:
            lease.extend()
            assert held(cache, "noisy") <= 6
            lease.commit()
            assert held(cache, "noisy") <= 6
        cache.check()
    assert cache.match(range(8), "quiet") == 8
    assert cache.usage("noisy").num_pages == 6
    assert cache.stats().num_free == 32 - 8 - 6


def test_a_request_beyond_the_quota_is_refused_by_name_and_nothing_has_changed():
    cache = PrefixCache(32, 1)
    cache.set_quota("a", 6)
    fill(cache, range(3), "a")
    lease = cache.acquire(range(3), "a")
    other = cache.acquire(range(10, 14), "a")
    before = snapshot(cache)
    with pytest.raises(QuotaExceeded) as caught:
        other.extend()
    error = caught.value
    assert (error.namespace, error.needed, error.max_pages, error.used, error.evictable) == ("a", 4, 6, 3, 0)
    assert snapshot(cache) == before
    lease.release()
    other.extend()
    assert held(cache, "a") == 6
    other.release()
    cache.check()


def test_pages_that_a_lock_holds_and_nobody_uses_count_as_evictable():
    cache = PrefixCache(32, 1)
    fill(cache, range(6), "a")
    cache.set_quota("a", 6)
    lease = cache.acquire(range(2), "a")  # locks all six
    assert cache.usage("a").num_evictable == 0
    other = cache.acquire(range(50, 55), "a")
    before = snapshot(cache)
    with pytest.raises(QuotaExceeded) as caught:
        other.extend()
    assert caught.value.evictable == 4
    assert snapshot(cache) == before
    other.release()
    fill(cache, range(50, 54), "a")
    assert cache.match(range(6), "a") == 2
    lease.release()
    cache.check()


def test_a_lower_quota_holds_at_once_as_far_as_nothing_is_locked():
    cache = PrefixCache(32, 1)
    fill(cache, range(8), "a")
    fill(cache, range(8), "b")
    with cache.acquire(range(5), "a"):
        assert cache.set_quota("a", 3) == 3
        assert held(cache, "a") == 5
        with pytest.raises(QuotaExceeded), cache.acquire(range(90, 92), "a") as lease:
            lease.extend()
    assert cache.set_quota("a", 3) == 2
    assert held(cache, "b") == 8
    assert cache.set_quota("a", 8) == 0
    assert cache.set_quota("unknown", 0) == 0
    cache.check()


def test_a_quota_of_nothing_lets_nothing_in():
    cache = PrefixCache(8, 1)
    cache.set_quota("a", 0)
    lease = cache.acquire([1], "a")
    with pytest.raises(QuotaExceeded):
        lease.extend()


def test_a_quota_above_what_there_is_changes_nothing():
    cache = PrefixCache(8, 1)
    cache.set_quota("", 100)
    fill(cache, range(8))
    fill(cache, range(20, 28))
    with pytest.raises(PoolExhausted) as caught, cache.acquire(range(9)) as lease:
        lease.extend()
    assert (caught.value.needed, caught.value.evictable) == (9, 8)
    cache.check()


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        ((-1,), "max_pages"),
        ((2.5,), "max_pages"),
        ((None, -1), "reserved_pages"),
        ((None, "all"), "reserved_pages"),
        ((4, 5), "reserved_pages"),
        ((None, 6), "reserved_pages"),
    ],
)
def test_a_quota_that_cannot_be_is_named_and_nothing_has_changed(arguments, setting):
    cache = PrefixCache(8, 1)
    cache.set_quota("a", 5, 2)
    fill(cache, [1, 2], "b")
    before = snapshot(cache), cache.quotas()
    with pytest.raises(ConfigError) as caught:
        cache.set_quota("b", *arguments)
    assert caught.value.setting == setting
    assert (snapshot(cache), cache.quotas()) == before


def test_quotas_and_usage_say_what_was_set():
    cache = PrefixCache(16, 1)
    named = Namespace("b", "weights")
    cache.set_quota("a", 8, 2)
    cache.set_quota(named, None, 4)
    assert cache.quotas() == (Quota("a", 8, 2), Quota(named, None, 4))
    assert cache.usage("a") == (0, 0, 0, 8, 2)
    lease = cache.acquire(range(4), "a")
    lease.extend()
    lease.commit(3)
    assert cache.usage("a") == (3, 0, 1, 8, 2)
    lease.release()
    assert cache.usage("a") == (3, 3, 0, 8, 2)
    assert cache.usage("nobody") == (0, 0, 0, None, 0)
    cache.set_quota("a")
    cache.set_quota(named)
    assert cache.quotas() == ()
    assert cache._allocator.quotas is None
    cache.check()


# -- reservations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_others_never_evict_what_is_reserved(policy):
    cache = PrefixCache(32, 1, policy=policy)
    cache.set_quota("a", reserved_pages=5)
    fill(cache, range(8), "a")
    for index in range(30):
        fill(cache, range(index * 20, index * 20 + 20), "b")
        cache.check()
    assert cache.usage("a").num_pages == 5
    assert cache.evict(100) == 27
    assert cache.usage("a").num_pages == 5
    assert cache.flush() == 0  # the user's word stands above it


def test_a_refusal_counts_only_what_the_asker_may_evict():
    cache = PrefixCache(16, 1)
    cache.set_quota("a", reserved_pages=10)
    fill(cache, range(12), "a")
    lease = cache.acquire(range(7), "b")
    before = snapshot(cache)
    with pytest.raises(PoolExhausted) as caught:
        lease.extend()
    assert (caught.value.needed, caught.value.free, caught.value.evictable) == (7, 4, 2)
    assert snapshot(cache) == before
    lease.release()
    fill(cache, range(6), "b")
    assert cache.usage("a").num_pages == 10
    fill(cache, range(100, 116), "a")  # its own reservation does not bind it
    assert (cache.usage("a").num_pages, cache.usage("b").num_pages) == (16, 0)
    cache.check()


def test_an_unused_reservation_is_borrowed_and_comes_back_with_use():
    cache = PrefixCache(16, 1)
    cache.set_quota("a", reserved_pages=10)
    fill(cache, range(16), "b")
    assert cache.usage("b").num_pages == 16
    fill(cache, range(8), "a")
    assert (cache.usage("a").num_pages, cache.usage("b").num_pages) == (8, 8)
    fill(cache, range(20, 28), "b")
    assert (cache.usage("a").num_pages, cache.usage("b").num_pages) == (8, 8)


def test_all_reservations_leave_a_page():
    cache = PrefixCache(10, 1)
    cache.set_quota("a", reserved_pages=5)
    with pytest.raises(ConfigError, match="at most 4"):
        cache.set_quota("b", reserved_pages=5)
    cache.set_quota("b", reserved_pages=4)
    cache.set_quota("a", reserved_pages=5)  # the same again is no more
    fill(cache, range(5), "a")
    fill(cache, range(4), "b")
    fill(cache, [1], "c")
    assert [cache.usage(namespace).num_pages for namespace in "abc"] == [5, 4, 1]


# -- order among namespaces -------------------------------------------------------------------------------------------


def test_lru_stays_lru_across_namespaces_with_quotas():
    plain, parted = PrefixCache(32, 1), PrefixCache(32, 1)
    parted.set_quota("a", 32)
    parted.set_quota("b", 31, 1)
    for cache in (plain, parted):
        for index in range(40):
            fill(cache, [index % 13, index % 7, index], "abc"[index % 3])
            if index % 5 == 0:
                cache.evict(2)
    assert resident(plain).keys() == resident(parted).keys()


def test_a_lower_level_goes_first_whosever_it_is():
    cache = PrefixCache(16, 1)
    cache.set_quota("a", 16)
    fill(cache, [1], "b")
    fill(cache, [2], "a", [Retain(0, None, 10)])
    fill(cache, [3], "b", [Retain(0, None, 5)])
    for expected in (3, 2, 1):
        there = {ids[0] for _, ids in resident(cache)}
        assert cache.evict(1) == 1
        assert there - {ids[0] for _, ids in resident(cache)} == {expected}


def test_a_quota_takes_effect_on_what_is_cached_and_goes_without_a_trace():
    cache = PrefixCache(16, 1)
    for index in range(4):
        fill(cache, [index], "ab"[index % 2])
    cache.set_quota("a", 8)
    cache.check()
    levels = cache._allocator.policy
    assert isinstance(levels, Levels)
    cache.set_quota("a")
    cache.check()
    order = []
    while cache.evict(1):
        order.append({ids[0] for _, ids in resident(cache)})
    assert order == [{1, 2, 3}, {2, 3}, {3}, set()]


@pytest.mark.pure
def test_a_thousand_quotas_do_not_make_an_eviction_look_at_each(monkeypatch):
    cache = PrefixCache(3000, 1)
    for index in range(1000):
        cache.set_quota(str(index), 5)
        fill(cache, [1, 2], str(index))
    cache.evict(1)
    looked = []
    group = type(cache._allocator.levels._shared)
    first = group.first
    monkeypatch.setattr(group, "first", lambda self: (looked.append(self), first(self))[1])
    assert cache.evict(100) == 100
    assert len(looked) < 400


@pytest.mark.parametrize(
    "spoil",
    [
        lambda cache: cache._allocator.levels._heads.clear(),
        lambda cache: cache._allocator.levels._places.clear(),
        lambda cache: setattr(next(cache._tree.walk(cache._tree.roots[cache.namespace_key("a")])), "children", None),
    ],
)
def test_check_sees_a_leaf_in_the_wrong_order(spoil):
    cache = PrefixCache(16, 1)
    cache.set_quota("a", 8)
    fill(cache, [1], "a")
    fill(cache, [2], "b")
    cache.evict(0)
    cache._allocator.policy.victim()
    cache.check()
    spoil(cache)
    with pytest.raises(InvariantError):
        cache.check()


def test_pins_and_reservations_together_leave_a_page_for_everybody_else():
    cache = PrefixCache(10, 1, pin_budget_pages=5)
    with pytest.raises(ConfigError) as caught:
        cache.set_quota("b", reserved_pages=5)
    assert "pins may take 5" in str(caught.value)
    cache.set_quota("b", reserved_pages=4)


def test_a_pool_that_is_full_of_what_is_pinned_and_reserved_says_so():
    cache = PrefixCache(10, 1, pin_budget_pages=5)
    cache.set_quota("b", reserved_pages=4)
    for ids, namespace in ((range(5), "a"), (range(5), "b")):
        with cache.acquire(ids, namespace) as lease:
            lease.extend()
            lease.commit()
    cache.pin(range(5), "a", owner="me")
    with cache.acquire(range(50, 52), "z") as lease, pytest.raises(PoolExhausted) as caught:
        lease.extend()
    assert (caught.value.evictable, caught.value.pinned, caught.value.reserved) == (1, 5, 4)
    assert "lower reservations" in str(caught.value)
