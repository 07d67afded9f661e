from __future__ import annotations

import pytest

from radixkv.cache import PrefixCache
from radixkv.errors import ConfigError, InvariantError, PinBudgetExceeded, PinError, PinReleased
from radixkv.events import Pinned, Unpinned
from radixkv.policies import POLICIES
from tests.core.models import resident, snapshot


def fill(cache: PrefixCache, ids, namespace="") -> int:
    """One whole request; how many of its tokens were cached."""
    with cache.acquire(ids, namespace) as lease:
        lease.extend()
        lease.commit()
        return lease.num_matched


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_pinned_stays_through_eviction_flush_and_removal(policy):
    cache = PrefixCache(16, 2, policy=policy, pin_budget_pages=4)
    fill(cache, range(12))
    pin = cache.pin(range(7), owner="ops")
    assert (pin.num_pages, pin.num_tokens, pin.owner) == (3, 6, "ops")
    assert cache.stats().num_pinned == 3
    for index in range(20):
        fill(cache, range(100 + index * 20, 120 + index * 20))
    assert cache.match(range(12)) == 6
    assert cache.evict(16) == 13
    assert cache.flush() == 3
    assert cache.remove(range(2)).num_locked == 2
    cache.check()
    pin.release()
    assert pin.released
    assert cache.stats().num_pinned == 0
    assert cache.flush() == 0
    assert not cache._tree.roots


def test_a_pin_is_a_context_manager_that_releases_once():
    cache = PrefixCache(8, 1, pin_budget_pages=4)
    fill(cache, [1, 2])
    with cache.pin([1, 2], owner="a") as pin:
        assert cache.pins() == (pin,)
        assert "'a'" in repr(pin)
    assert cache.pins() == ()
    assert "released" in repr(pin)
    for use in (pin.release, pin.__enter__):
        with pytest.raises(PinReleased) as caught:
            use()
        assert caught.value.pin_id == pin.id
    with cache.pin([1], owner="a") as pin:
        pin.release()
    cache.check()


def test_a_pin_locks_its_pages_and_not_the_rest_of_the_edge():
    cache = PrefixCache(8, 1, pin_budget_pages=4)
    fill(cache, range(8))
    cache.pin(range(3), owner="a")
    stats = cache.stats()
    assert (stats.num_locked, stats.num_evictable) == (3, 5)
    assert cache.evict(8) == 5


def test_pages_of_several_pins_count_once_in_all_and_once_for_each_owner():
    cache = PrefixCache(16, 1, pin_budget_pages=6, pin_budget_per_owner=4)
    fill(cache, [1, 2, 3, 4])
    fill(cache, [1, 2, 5, 6])
    first = cache.pin([1, 2, 3, 4], owner="a")
    cost = cache.pin_cost([1, 2, 5, 6], owner="b")
    assert (cost.added_pages, cost.pinned_pages, cost.owner_added_pages) == (2, 2, 4)
    assert (cost.left_before, cost.left_after, cost.owner_left_before, cost.owner_left_after) == (2, 0, 4, 0)
    second = cache.pin([1, 2, 5, 6], owner="b")
    assert cache.stats().num_pinned == 6
    again = cache.pin([1, 2, 3, 4], owner="a")  # the same twice costs nothing
    assert cache.stats().num_pinned == 6
    first.release()
    assert cache.stats().num_pinned == 6
    again.release()
    assert cache.stats().num_pinned == 4
    assert cache.evict(16) == 2
    second.release()
    assert cache.stats().num_pinned == 0
    cache.check()


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        ({"pin_budget_pages": 5}, "pin_budget_pages"),
        ({"pin_budget_pages": -1}, "pin_budget_pages"),
        ({"pin_budget_pages": 2.5}, "pin_budget_pages"),
        ({"pin_budget_pages": 4, "pin_budget_per_owner": 5}, "pin_budget_per_owner"),
        ({"pin_budget_pages": 4, "pin_budget_per_owner": -1}, "pin_budget_per_owner"),
        ({"pin_budget_pages": 4, "pin_budget_per_owner": "all"}, "pin_budget_per_owner"),
    ],
)
def test_a_budget_that_cannot_be_is_named(arguments, setting):
    with pytest.raises(ConfigError) as caught:
        PrefixCache(9, 1, **arguments)
    assert caught.value.setting == setting


def test_pins_are_off_unless_there_is_a_budget():
    cache = PrefixCache(8, 1)
    fill(cache, [1, 2])
    before = snapshot(cache)
    assert cache.pin_cost([1, 2], owner="a").refusal == "off"
    with pytest.raises(PinError, match="pin_budget_pages") as caught:
        cache.pin([1, 2], owner="a")
    assert caught.value.reason == "off"
    assert snapshot(cache) == before


@pytest.mark.parametrize("namespace", ["", "unknown"])
def test_nothing_cached_is_nothing_to_pin(namespace):
    cache = PrefixCache(8, 2, pin_budget_pages=4)
    fill(cache, [1, 2])
    before = snapshot(cache)
    cost = cache.pin_cost([1, 3, 4], namespace, owner="a")
    assert (cost.refusal, cost.num_tokens, cost.cached_tokens, cost.allowed) == ("not_cached", 3, 0, False)
    with pytest.raises(PinError) as caught:
        cache.pin([1, 3, 4], namespace, owner="a")
    assert (caught.value.reason, caught.value.num_tokens) == ("not_cached", 3)
    assert snapshot(cache) == before


def test_a_pin_beyond_a_budget_names_it_and_nothing_has_changed():
    cache = PrefixCache(16, 1, pin_budget_pages=5, pin_budget_per_owner=3)
    fill(cache, range(6))
    fill(cache, range(10, 16))
    cache.pin(range(3), owner="a")
    before = snapshot(cache)
    with pytest.raises(PinBudgetExceeded) as caught:
        cache.pin(range(10, 13), owner="b")
    assert (caught.value.needed, caught.value.left, caught.value.owner, caught.value.budget) == (3, 2, "b", 5)
    with pytest.raises(PinBudgetExceeded) as caught:
        cache.pin(range(10, 12), owner="a")
    assert (caught.value.needed, caught.value.left, caught.value.owner, caught.value.budget) == (2, 0, "a", 3)
    assert cache.pin_cost(range(10, 12), owner="a").refusal == "owner_budget"
    assert snapshot(cache) == before
    assert len(cache.pins()) == 1


def test_the_cost_of_a_pin_is_what_it_then_does():
    cache = PrefixCache(16, 2, pin_budget_pages=8)
    fill(cache, range(12))
    with cache.acquire(range(5)):  # a lock on all of the edge, of which it uses three pages
        cost = cache.pin_cost(range(4), owner="a")
        assert (cost.cached_tokens, cost.added_pages, cost.evictable_after) == (4, 2, 3)
        cache.pin(range(4), owner="a")
        assert cache.evict(16) == cost.evictable_after


def test_with_the_whole_budget_pinned_every_other_page_can_still_be_had():
    cache = PrefixCache(16, 1, pin_budget_pages=8)
    fill(cache, range(16))
    cache.pin(range(8), owner="a")
    assert fill(cache, range(100, 108)) == 0
    assert cache.match(range(16)) == 8
    assert cache.stats().num_free == 0
    cache.check()


def test_a_pinned_conversation_goes_on():
    cache = PrefixCache(16, 1, pin_budget_pages=8)
    cursor = cache.cursor(tokens=range(4))
    for turn in range(3):
        with cache.acquire(cursor) as lease:
            assert lease.num_matched == (4 + turn if turn else 0)
            lease.extend([50 + turn])
            lease.commit()
        if turn == 0:
            cache.pin(range(4), owner="a")
        cache.check()
    assert cache.stats().num_pinned == 4


def test_pins_are_told_as_events():
    events = []
    cache = PrefixCache(8, 1, pin_budget_pages=4, on_event=events.append)
    fill(cache, [1, 2])
    pin = cache.pin([1, 2, 3], owner="a")
    assert events[-1] == Pinned(events[-1].tick, pin.namespace, pin.id, "a", 2)
    pin.release()
    assert events[-1] == Unpinned(events[-2].tick + 1, pin.namespace, pin.id, "a", 2)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda cache, pin: setattr(cache._pins, "num_pages", 9), "I4"),
        (lambda cache, pin: cache._tree.unlock(pin._node), "I7"),
        (lambda cache, pin: setattr(pin, "num_pages", 1), "I4"),
        (lambda cache, pin: cache._pins._live.clear() or setattr(cache._pins, "num_pages", 0), "I7"),
    ],
)
def test_check_names_what_is_wrong_with_a_pin(spoil, name):
    cache = PrefixCache(8, 1, pin_budget_pages=4)
    fill(cache, [1, 2, 3])
    pin = cache.pin([1, 2], owner="a")
    cache.check()
    spoil(cache, pin)
    with pytest.raises(InvariantError) as caught:
        cache.check()
    assert caught.value.invariant == name


def test_a_pin_in_one_namespace_is_none_in_another():
    cache = PrefixCache(16, 1, pin_budget_pages=4)
    fill(cache, [1, 2], "a")
    fill(cache, [1, 2], "b")
    cache.pin([1, 2], "a", owner="ops")
    cache.flush()
    assert {name for name, _ in resident(cache)} == {cache.namespace_key("a")}
