from __future__ import annotations

from array import array
from fractions import Fraction
from math import inf

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from radixkv.cache import PrefixCache
from radixkv.errors import ConfigError, LeaseReleased
from radixkv.node import Account, Node
from radixkv.policies import POLICIES, Levels, Lru
from radixkv.policies.levels import priority
from radixkv.retention import DEFAULT_PRIORITY, Retain, Retention
from tests.core.limits import SITUATIONS, level, limits_walk
from tests.core.models import resident, snapshot


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def fill(cache: PrefixCache, ids, retention=(), namespace="") -> int:
    """One whole request; how many of its tokens were cached."""
    with cache.acquire(ids, namespace, retention=retention) as lease:
        lease.extend()
        lease.commit()
        return lease.num_matched


def wishes(cache: PrefixCache) -> dict[tuple[int, int], int]:
    """Of each node in the only path, [start, end) in pages and its priority."""
    return {
        (node.start, node.end): node.retain.priority if node.retain else DEFAULT_PRIORITY
        for node in cache._tree.walk()
        if node.parent is not None
    }


# -- the wish itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        ("start", (-1, None, 50)),
        ("start", (0.5, None, 50)),
        ("stop", (4, 4, 50)),
        ("stop", (4, 3, 50)),
        ("priority", (0, None, 101)),
        ("priority", (0, None, -1)),
        ("priority", (0, None, "high")),
        ("ttl_s", (0, None, 50, 0)),
        ("ttl_s", (0, None, 50, -1.0)),
        ("ttl_s", (0, None, 50, inf)),
        ("ttl_s", (0, None, 50, "5m")),
        ("decay", (0, None, 50, 5.0, "sudden")),
    ],
)
def test_a_wish_that_cannot_be_is_named(setting, given):
    with pytest.raises(ConfigError) as caught:
        Retain(*given)
    assert caught.value.setting == setting


@pytest.mark.parametrize("ranges", [[Retain(0, 5, 50), Retain(4, 9, 60)], [Retain(3, None, 50), Retain(9, 12, 60)], [7]])
def test_ranges_that_overlap_are_refused_and_nothing_has_changed(ranges):
    cache = PrefixCache(8, 1)
    fill(cache, [1, 2])
    before = snapshot(cache)
    with pytest.raises(ConfigError) as caught:
        cache.acquire([1, 2, 3], retention=ranges)
    assert caught.value.setting == "retention"
    assert snapshot(cache) == before
    lease = cache.acquire([1, 2])
    with pytest.raises(ConfigError):
        lease.retain(ranges)
    lease.release()
    with pytest.raises(LeaseReleased):
        lease.retain([])


@given(
    st.integers(0, 100),
    st.integers(1, 64),
    st.sampled_from(["step", "linear"]),
    st.integers(0, 10**6),
    st.integers(-5, 200),
)
@settings(max_examples=300)
def test_a_level_is_what_the_definition_says(priority, ttl_s, decay, used_s, elapsed_s):
    wish = Retain(0, None, priority, ttl_s, decay)
    now_s = used_s + elapsed_s
    standing = wish.standing(float(used_s), float(now_s))
    exact = level(wish, used_s, max(now_s, used_s))
    way = Fraction((priority - 35) * elapsed_s, ttl_s)
    assert abs(standing.level - exact) <= (decay == "linear" and abs(way - round(way)) < Fraction(1, 10**6))
    assert standing.due_s > now_s
    if standing.due_s < inf:
        assert wish.standing(float(used_s), standing.due_s).level != standing.level
    else:
        assert standing.level == 35


def test_a_tiny_ttl_and_a_late_clock_end_in_the_default():
    wish = Retain(0, None, 80, 1e-300, "linear")
    assert wish.standing(1e9, 1e9) == (35, inf)
    assert wish.standing(0.0, 1e9) == (35, inf)


def test_a_wish_without_an_end_never_falls():
    assert Retain(0, None, 80).standing(0.0, 1e12) == (80, inf)
    assert Retain(0, None, 35, 5.0).standing(0.0, 1.0) == (35, inf)


def test_the_stronger_of_two_wishes_is_the_higher_then_the_longer_and_below_the_default_the_shorter():
    high, low = Retain(0, None, 80), Retain(0, None, 10)
    assert high.stronger(low)
    assert not low.stronger(high)
    assert high.stronger(None)
    assert not low.stronger(None)
    assert not high.stronger(Retain(5, 9, 80))
    assert high.stronger(Retain(0, None, 80, 5.0))
    assert Retain(0, None, 80, 5.0).stronger(Retain(0, None, 80, 5.0, "linear"))
    assert Retain(0, None, 10, 5.0).stronger(low)
    assert not low.stronger(Retain(0, None, 10, 5.0))


# -- where it goes ----------------------------------------------------------------------------------------------------


def test_a_page_belongs_to_the_range_of_its_first_token():
    cache = PrefixCache(16, 4)
    fill(cache, range(32), [Retain(4, 10, 80), Retain(17, 25, 10)])
    # pages begin at 0 4 8 12 16 20 24 28
    assert wishes(cache) == {(0, 1): 35, (1, 3): 80, (3, 5): 35, (5, 7): 10, (7, 8): 35}
    cache.check()


def test_an_open_range_takes_in_what_is_generated():
    cache = PrefixCache(16, 2)
    with cache.acquire([1, 2, 3, 4], retention=[Retain(4, None, 0)]) as lease:
        lease.extend()
        lease.commit()
        lease.extend([5, 6, 7, 8, 9])
        lease.commit()
    assert wishes(cache) == {(0, 2): 35, (2, 4): 0}


def test_what_a_lease_says_last_holds():
    cache = PrefixCache(16, 1)
    with cache.acquire([1, 2, 3], retention=[Retain(0, None, 80)]) as lease:
        lease.extend()
        lease.commit()
        assert wishes(cache) == {(0, 3): 35}  # nothing before the release
        lease.retain([Retain(2, None, 10)])
    assert wishes(cache) == {(0, 2): 35, (2, 3): 10}
    with cache.acquire([1, 2, 3], retention=[Retain(0, None, 80)]) as lease:
        lease.retain([])
    assert wishes(cache) == {(0, 2): 35, (2, 3): 10}


def test_a_range_beyond_the_pages_or_within_one_marks_nothing():
    cache = PrefixCache(16, 4)
    fill(cache, range(8), [Retain(8, None, 80), Retain(1, 4, 80)])
    assert wishes(cache) == {(0, 2): 35}
    with cache.acquire([99], retention=[Retain(0, None, 80)]):
        pass  # nothing of it was published
    cache.check()


def test_the_path_is_split_only_where_the_wish_changes():
    cache = PrefixCache(16, 1)
    for _ in range(3):
        fill(cache, range(8), [Retain(0, 4, 80)])
    assert wishes(cache) == {(0, 4): 80, (4, 8): 35}
    fill(cache, range(8), [Retain(2, 6, 50)])
    assert wishes(cache) == {(0, 4): 80, (4, 6): 50, (6, 8): 35}
    fill(cache, range(8), [Retain(0, None, 35)])
    fill(cache, range(8), [Retain(0, None, 10)])
    assert wishes(cache) == {(0, 4): 80, (4, 6): 50, (6, 8): 35}
    fill(cache, range(8), [Retain(0, None, 90)])
    assert set(wishes(cache).values()) == {90}
    cache.check()


def test_a_request_may_lower_its_own_pages_and_raise_all_of_them():
    cache = PrefixCache(16, 1)
    fill(cache, range(4))
    fill(cache, range(8), [Retain(0, None, 10)])
    assert wishes(cache) == {(0, 4): 35, (4, 8): 10}
    fill(cache, range(8), [Retain(0, None, 35)])
    assert wishes(cache) == {(0, 4): 35, (4, 8): 35}
    assert all(node.retain is None for node in cache._tree.walk())


def test_a_split_keeps_the_wish_on_both_sides_and_a_retained_leaf_does_not_grow():
    cache = PrefixCache(16, 1)
    fill(cache, [1, 2, 3, 4], [Retain(0, None, 80)])
    fill(cache, [1, 2, 9])
    assert wishes(cache) == {(0, 2): 80, (2, 4): 80, (2, 3): 35}
    cache = PrefixCache(16, 1)
    fill(cache, [1, 2], [Retain(0, None, 80)])
    fill(cache, [1, 2, 3, 4])
    assert wishes(cache) == {(0, 2): 80, (2, 4): 35}
    fill(cache, [1, 2, 3, 4, 5])
    assert wishes(cache) == {(0, 2): 80, (2, 5): 35}  # what nobody asked for grows in place


def test_a_cursor_keeps_its_place_through_retention():
    cache = PrefixCache(16, 1)
    cursor = cache.cursor(tokens=[1, 2, 3])
    for turn in range(4):
        with cache.acquire(cursor, retention=[Retain(0, 2, 80), Retain(3 + turn, None, 10)]) as lease:
            assert lease.num_matched == (3 + turn if turn else 0)
            lease.extend([10 + turn])
            lease.commit()
        cache.check()
    assert wishes(cache)[0, 2] == 80


# -- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_low_priority_goes_before_everything_else(policy):
    cache = PrefixCache(12, 1, policy=policy)
    for first in range(4):
        fill(cache, [first, 50])
    with cache.acquire([7, 8]) as lease:  # the newest of all: an answer with thinking that the template will drop
        lease.extend()
        lease.commit()
        lease.extend([100, 101])
        lease.commit()
        lease.retain([Retain(2, None, 0)])
    assert cache.evict(2) == 2
    assert cache.match([7, 8, 100, 101]) == 2
    assert all(cache.match([first, 50]) == 2 for first in range(4))
    cache.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_flood_of_long_prompts_leaves_the_retained_set_alone_until_its_time_is_over(policy):
    clock = Clock()
    cache = PrefixCache(96, 1, policy=policy, clock=clock)
    hot = [[10**6 + index, 1, 2, 3] for index in range(8)]
    for ids in hot:
        fill(cache, ids, [Retain(0, None, 80, ttl_s=60.0)])
    for index in range(100):
        clock.now_s += 0.1
        fill(cache, range(index * 40, index * 40 + 40))
    cache.check()
    assert [cache.match(ids) for ids in hot] == [4] * 8
    clock.now_s += 60.0
    for index in range(100, 200):
        clock.now_s += 0.1
        fill(cache, range(index * 40, index * 40 + 40))
    cache.check()
    assert [cache.match(ids) for ids in hot] == [0] * 8


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_retained_still_goes_when_nothing_else_is_left(policy):
    cache = PrefixCache(8, 1, policy=policy)
    fill(cache, range(8), [Retain(0, None, 100)])
    assert fill(cache, range(100, 108)) == 0
    assert cache.match(range(8)) == 0


def test_levels_go_from_the_lowest_to_the_highest_whatever_came_first():
    cache = PrefixCache(32, 1)
    order = (80, 10, 35, 100, 0, 60)
    for number in order:
        fill(cache, [number], [Retain(0, None, number)])
    gone = []
    while cache.evict(1):
        left = {ids[0] for _, ids in resident(cache)}
        gone += [number for number in order if number not in left and number not in gone]
    assert gone == sorted(order)


def test_a_hit_begins_the_time_anew_and_so_does_one_through_a_child():
    clock = Clock()
    cache = PrefixCache(32, 1, clock=clock)
    for first in (1, 2, 3):
        fill(cache, [first, first], [Retain(0, None, 80, 10.0)])
    clock.now_s = 8.0
    fill(cache, [1, 1])
    fill(cache, [2, 2, 9])  # through it, to a child
    clock.now_s = 12.0
    fill(cache, [4, 4])
    assert cache.evict(2) == 2  # 3's time is over, and it is the oldest of its level
    assert cache.match([3, 3]) == 0
    assert cache.evict(3) == 3
    assert (cache.match([2, 2, 9]), cache.match([4, 4]), cache.match([1, 1])) == (2, 0, 2)
    clock.now_s = 19.0
    fill(cache, [5])
    assert cache.evict(4) == 4  # of one level now: what was used last stays
    assert cache.match([5]) == 1


def test_a_wish_below_the_default_comes_back_up():
    clock = Clock()
    cache = PrefixCache(8, 1, clock=clock)
    fill(cache, [1])
    clock.now_s = 1.0
    fill(cache, [2], [Retain(0, None, 0, 5.0)])
    clock.now_s = 6.0
    assert cache.evict(1) == 1
    assert cache.match([2]) == 1


def test_a_linear_wish_passes_through_the_levels_on_its_way():
    clock = Clock()
    cache = PrefixCache(16, 1, clock=clock)
    fill(cache, [1], [Retain(0, None, 85, 50.0, "linear")])  # a level a second
    fill(cache, [2], [Retain(0, None, 60)])
    clock.now_s = 24.0
    assert cache.evict(0) == 0
    victims = []
    for now_s in (24.0, 26.0):
        clock.now_s = now_s
        victims.append(cache._allocator.policy.victim().key[0])
    assert victims == [2, 1]
    cache.check()


def test_policies_change_under_retention():
    clock = Clock()
    cache = PrefixCache(16, 1, clock=clock)
    fill(cache, [1], [Retain(0, None, 80, 5.0)])
    fill(cache, [2])
    for policy in (*POLICIES, "lru"):
        cache.set_policy(policy)
        cache.check()
        assert cache._allocator.policy.victim().key[0] == 2
    clock.now_s = 5.0
    assert cache._allocator.policy.victim().key[0] == 1


def test_without_retention_the_bare_policy_rules():
    cache = PrefixCache(8, 1)
    fill(cache, [1, 2])
    assert isinstance(cache._allocator.policy, Lru)
    assert isinstance(cache._tree.order, Lru)
    fill(cache, [3], [Retain(0, None, 50)])
    assert isinstance(cache._tree.order, Levels)
    cache.check()


def test_the_policy_priority_has_its_levels_from_the_start():
    cache = PrefixCache(8, 1, policy="priority")
    assert isinstance(cache._tree.order, Levels)
    fill(cache, [1, 2])
    fill(cache, [3], [Retain(0, None, 0)])
    assert cache.evict(1) == 1
    assert cache.match([1, 2]) == 2
    cache.set_policy("lru")
    assert isinstance(cache._tree.order, Levels)
    unused = PrefixCache(8, 1, policy="lfu")
    unused.set_policy("priority")
    fill(unused, [1], [Retain(0, None, 80)])
    assert isinstance(unused._allocator.policy.base, Lru)


def leaf(tick: int, wish: Retain | None = None, time_s: float = 0.0) -> Node:
    node = Node(Account(b"x"), None, 0, bytearray(), array("i", [tick]))
    node.tick, node.retain, node.time_s = tick, wish, time_s
    return node


@pytest.mark.pure
def test_naming_a_victim_looks_at_no_leaf_that_is_not_due():
    looked = []

    class Watched(Lru):
        def victim(self):
            looked.append(1)
            return self._queue.first()

    class Base(Lru):
        pass

    clock = Clock()
    levels = Levels(Base(0), lambda: Watched(0), clock)
    falls = [leaf(tick, Retain(0, None, 80, 1000.0 + tick), 0.0) for tick in range(1000)]
    for one in falls:
        levels.add(one)
    plain = [leaf(tick) for tick in range(1000, 2000)]
    for one in plain:
        levels.add(one)
    assert [levels.victim() for _ in range(5)] == [plain[0]] * 5
    assert levels.num_falls == 0
    clock.now_s = 1001.0
    assert levels.victim() is falls[0]
    assert levels.num_falls == 2


@pytest.mark.pure
def test_a_policy_that_learns_shares_itself_with_its_siblings():
    made = []

    class Learner(Lru):
        learns = True

        def __init__(self, num_pages: int, told: list[object]) -> None:
            super().__init__(num_pages)
            self.told = told

        def ended(self, request):
            self.told.append(request)

        def sibling(self):
            made.append(Learner(0, self.told))
            return made[-1]

    base = Learner(0, [])
    levels = Levels(base, lambda: Lru(0), Clock())
    assert levels.learns
    levels.add(leaf(1, Retain(0, None, 80)))
    levels.add(leaf(2))
    levels.ended("a request")
    assert len(made) == 1
    assert made[0].told == ["a request"]
    assert len(base) == len(made[0]) == 1


def test_leaves_that_come_and_go_leave_nothing_behind():
    clock = Clock()
    levels = priority(0)
    levels.set_clock(clock)
    levels.set_group(b"x", 0, [])
    for tick in range(5000):
        clock.now_s += 1.0
        one = leaf(tick, Retain(0, None, tick % 101, 1e6, "linear"), clock.now_s)
        levels.add(one)
        assert levels.victim() is one
        levels.discard(one)
    assert len(levels) == 0
    assert levels.victim() is None
    assert len(levels._heads) < 100
    assert not levels._due_s
    assert not levels._places
    assert len(levels._groups[b"x"]._parts) == 1


def test_a_retention_is_its_ranges_in_order():
    ranges = (Retain(5, None, 10), Retain(0, 5, 80))
    assert Retention(ranges).ranges == (ranges[1], ranges[0])
    assert Retention(()).ranges == ()


# -- everything together ----------------------------------------------------------------------------------------------


@pytest.mark.pure
@pytest.mark.parametrize("seed", [1])
def test_retention_pins_and_quotas_equal_their_model_on_long_walks(seed):
    seen = limits_walk(seed, num_worlds=240)
    assert min(seen[name] for name in SITUATIONS) >= 20, seen


def test_numbers_of_any_integer_type_mean_the_same():
    for kind in (np.uint32, np.int64, np.int8, np.uint8):
        cache = PrefixCache(32, 2)
        with cache.acquire(range(16), retention=[Retain(kind(0), kind(5), kind(0), np.float32(9))]) as lease:
            lease.extend()
            lease.commit()
        cache.check()
        levels = [(node.start, node.end, node.retain is not None) for node in cache._tree.walk() if node.parent]
        assert levels == [(0, 3, True), (3, 8, False)]
        assert all(type(number) is int for level in levels for number in level[:2])


@pytest.mark.parametrize("back", [5.0, 99.0])
def test_a_clock_that_is_set_back_hangs_nothing_and_raises_no_level(back):
    times = iter([0.0] * 3 + [100.0])
    cache = PrefixCache(8, 2, clock=lambda: next(times, back))
    with cache.acquire(range(8), retention=[Retain(0, None, 80, ttl_s=50)]) as lease:
        lease.extend()
        lease.commit()
    assert cache.evict(1) == 1
    cache.check()
    assert cache.evict(9) == 3


def test_nobody_lowers_pages_that_another_published_first():
    cache = PrefixCache(32, 2)
    first, second = cache.acquire(range(8)), cache.acquire(range(8), retention=[Retain(0, None, 0)])
    for lease in (first, second):
        lease.extend()
        lease.commit()
        lease.release()
    with cache.acquire(range(8), limit=7, retention=[Retain(0, None, 0)]) as lease:
        lease.extend()
        lease.commit()
    assert all(node.retain is None for node in cache._tree.walk())
