from __future__ import annotations

import heapq
from array import array

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import radixkv.policies.queues
from radixkv.node import Account, Node
from radixkv.policies import POLICIES, Lru, TickQueue


def leaf(tick: int) -> Node:
    node = Node(Account(b""), None, 0, bytearray(), array("i"))
    node.tick = tick
    return node


@given(st.lists(st.tuples(st.sampled_from(["new", "old", "again", "drop", "drop first"]), st.integers(0, 40))))
@settings(max_examples=150)
def test_a_tick_queue_is_a_sorted_list(operations):
    queue, model, left = TickQueue(), [], []
    tick = 0
    for what, number in operations:
        if what == "new":  # the newest tick of all, as nearly always
            tick += 1
            model.append(leaf(tick))
            queue.add(model[-1])
        elif what == "old":  # any tick, the same as another's even
            model.append(leaf(min(number, tick)))
            queue.add(model[-1])
        elif what == "again" and left:
            model.append(left.pop(number % len(left)))
            queue.add(model[-1])
        elif model and what in ("drop", "drop first"):
            node = queue.first() if what == "drop first" else model[number % len(model)]
            model.remove(node)
            left.append(node)
            queue.discard(node)
            queue.discard(node)  # whoever is not in is not taken out
        assert len(queue) == len(model)
        assert all(node in queue for node in model)
        assert not any(node in queue for node in left)
        first = queue.first()
        assert (first is None) == (not model)
        if model:
            assert first in model
            assert first.tick == min(node.tick for node in model)
    drained = []
    while (first := queue.first()) is not None:
        drained.append(first.tick)
        queue.discard(first)
    assert drained == sorted(node.tick for node in model)


def test_leaves_of_one_tick_leave_in_some_order_and_all_of_them():
    queue = TickQueue()
    leaves = [leaf(tick) for tick in (5, 3, 3, 5, 3)]
    for node in leaves:
        queue.add(node)
    ticks = []
    while (first := queue.first()) is not None:
        ticks.append(first.tick)
        queue.discard(first)
    assert ticks == [3, 3, 3, 5, 5]


def test_a_leaf_that_comes_back_with_another_tick_is_found_by_its_new_one():
    queue = TickQueue()
    old, middle, new = leaf(1), leaf(5), leaf(9)
    for node in (new, middle, old):
        queue.add(node)
    queue.discard(old)
    old.tick = 7
    queue.add(old)
    order = []
    while (first := queue.first()) is not None:
        order.append(first)
        queue.discard(first)
    assert order == [middle, old, new]


def test_leaves_that_left_do_not_pile_up():
    queue = TickQueue()
    queue.add(leaf(10**9))  # everybody else is late
    kept = [leaf(tick) for tick in range(10)]
    for node in kept:
        queue.add(node)
    for tick in range(10_000):
        node = leaf(tick)
        queue.add(node)
        queue.discard(node)
    assert len(queue._late._heap) <= 64 + 4 * len(kept)
    assert len(queue) == 11
    assert queue.first() is kept[0]


def test_leaves_that_were_away_keep_their_place_and_do_not_pile_up():
    queue = TickQueue()
    kept = [leaf(tick) for tick in range(10)]
    for node in kept:
        queue.add(node)
    for node in kept[::2]:
        queue.discard(node)
    assert [node in queue for node in kept] == [False, True] * 5
    for node in kept[::2]:
        queue.add(node)
    assert len(queue) == 10
    assert len(queue._late) == 0
    for tick in range(10, 10_000):
        node = leaf(tick)
        queue.add(node)
        queue.discard(node)
    assert len(queue._recent) <= 2 * 64 + 2 * len(kept)
    order = []
    while (first := queue.first()) is not None:
        order.append(first)
        queue.discard(first)
    assert order == kept


def test_the_newest_tick_costs_no_heap_operation(monkeypatch):
    pushed = []
    monkeypatch.setattr(
        radixkv.policies.queues, "heappush", lambda heap, entry: (pushed.append(entry), heapq.heappush(heap, entry))
    )
    queue = TickQueue()
    leaves = [leaf(tick) for tick in range(1000)]
    for node in leaves:
        queue.add(node)
    assert not pushed
    for node in leaves:
        assert queue.first() is node
        queue.discard(node)
    assert not pushed
    queue.add(leaf(7))
    queue.add(leaf(3))
    assert len(pushed) == 2


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_holds_what_was_added_until_it_is_discarded(name):
    policy = POLICIES[name](100)
    assert policy.victim() is None
    assert len(policy) == 0
    leaves = [leaf(tick) for tick in (4, 2, 8)]
    for count, node in enumerate(leaves, 1):
        policy.add(node)
        assert node in policy
        assert len(policy) == count
    while (victim := policy.victim()) is not None:
        assert policy.victim() is victim  # asking takes nothing
        assert victim in leaves
        policy.discard(victim)
        leaves.remove(victim)
        assert victim not in policy
    assert not leaves


def test_lru_takes_the_oldest_first():
    policy = Lru(100)
    for tick in (4, 2, 8, 6):
        policy.add(leaf(tick))
    ticks = []
    while (victim := policy.victim()) is not None:
        ticks.append(victim.tick)
        policy.discard(victim)
    assert ticks == [2, 4, 6, 8]
