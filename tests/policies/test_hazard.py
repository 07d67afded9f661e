from __future__ import annotations

import random
from array import array
from collections import deque

import numpy as np
import pytest

from radixkv.cache import PrefixCache
from radixkv.node import Account, Node
from radixkv.policies.hazard import Hazard
from radixkv.policies.policy import Ended
from radixkv.policies.reuse_model import Mark
from radixkv.replay.curve import lru_curve
from radixkv.replay.reuse import Reuse
from radixkv.replay.simulate import simulate
from radixkv.replay.workload import Workload
from tests.replay.traces import random_paths, requests_of


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def serve(cache, tokens, tag=0):
    """One request from look-up to release; how many tokens it found."""
    with cache.acquire(np.array(tokens, np.int32), tag=tag) as lease:
        lease.extend()
        lease.commit()
    return lease.num_matched


def replayed(policy, requests, capacity, tags=None, **more):
    with Workload.of(requests) as workload:
        return simulate(workload, policy, capacity, tags=tags, **more)


def hot_and_flood(seed, num_requests=6000):
    """A hot set of 30 prompts, asked again and again, under one-shot prompts that are never asked again."""
    chance = random.Random(seed)
    hot = [list(range(10 * i, 10 * i + 10)) for i in range(30)]
    fresh, paths = 300, []
    for number in range(num_requests):
        if number % 4 == 0:
            paths.append(chance.choice(hot))
        else:
            size = chance.randrange(20, 40)
            paths.append(list(range(fresh, fresh + size)))
            fresh += size
    return paths


def test_a_flood_of_one_shot_prompts_does_not_wash_out_a_hot_set():
    """Between two uses of a hot prompt some 10,000 fresh pages come by, through a cache of 1,000."""
    requests = requests_of(hot_and_flood(0))
    reachable = 1500 * 10
    lru, auto = replayed("lru", requests, 1000), replayed("auto", requests, 1000)
    assert lru.hit_pages < 0.4 * reachable
    assert auto.hit_pages > 0.8 * reachable


def loops(seed, num_requests=6000):
    """What looks alike and is not: a loop larger than the cache, then skewed random prompts, in turns."""
    chance = random.Random(seed)
    prompts = [list(range(20 * i, 20 * i + 20)) for i in range(400)]
    return [
        prompts[number % 300 if number // 1500 % 2 == 0 else int(400 * chance.random() ** 3)]
        for number in range(num_requests)
    ]


def flips(seed, num_requests=6000):
    """Short prompts go on and long ones do not; then the other way round, and back, and again."""
    chance = random.Random(seed)
    fresh, open_, paths = 0, [], []
    for number in range(num_requests):
        if open_ and chance.random() < 0.5:
            path = open_.pop(chance.randrange(len(open_)))
            size = 3
        else:
            path, size = [], chance.choice((4, 40))
        path = [*path, *range(fresh, fresh + size)]
        fresh += size
        paths.append(path)
        if (len(path) < 20) == (number * 4 // num_requests % 2 == 0):
            open_ = [*open_[-60:], path]
    return paths


@pytest.mark.parametrize("paths", [loops(0), flips(1)], ids=["loops", "flips"])
@pytest.mark.parametrize("percent", [2, 5, 20])
def test_where_the_past_misleads_little_is_lost_to_lru(paths, percent):
    requests = requests_of(paths)
    with Workload.of(requests) as workload:
        capacity = workload.num_pages * percent // 100
        lru = lru_curve(workload, Reuse.of(workload)).row(capacity)
        auto = simulate(workload, "auto", capacity)
    assert auto.page_hit_rate > lru.page_hit_rate - 0.005


def sessions(seed, num_requests=2500):
    """Prompts of which half are continued a minute later, by a bit that nothing else tells of."""
    chance = random.Random(seed)
    fresh, due, paths, bits = 0, [], [], []
    for number in range(num_requests):
        path = due.pop(0)[1] if due and due[0][0] <= number else []
        path = [*path, *range(fresh, fresh + 8)] if len(path) < 80 else list(range(fresh, fresh + 8))
        fresh += 8
        paths.append(path)
        bits.append(chance.random() < 0.5)
        if bits[-1]:
            due.append((number + 60, path))
    return paths, bits


def test_a_tag_is_believed_as_far_as_it_has_been_right():
    paths, bits = sessions(0)
    chance = random.Random(1)
    requests = requests_of(paths)
    hits = {}
    for name, accuracy in (("blind", 0.5), ("good", 0.9), ("perfect", 1.0), ("lying", 0.0)):
        tags = [int(bit if chance.random() < accuracy else not bit) for bit in bits]
        hits[name] = replayed("auto", requests, 700, tags.__getitem__).hit_pages
    hits["none"] = replayed("auto", requests, 700).hit_pages
    assert hits["perfect"] > hits["good"] > 1.1 * hits["none"]
    assert hits["lying"] == hits["perfect"]  # a tag has no meaning of its own
    assert hits["blind"] > 0.9 * hits["none"]


@pytest.mark.parametrize("tags", [lambda _: -5, lambda _: 10**9, lambda number: number], ids=["negative", "huge", "all"])
def test_odd_tags_do_no_harm(tags):
    requests = requests_of(hot_and_flood(2, 1500))
    row = replayed("auto", requests, 500, tags, check_every=500)
    assert row.hit_pages >= replayed("lru", requests, 500).hit_pages


@pytest.mark.parametrize("seed", range(12))
def test_the_invariants_hold_at_every_capacity(seed):
    paths = random_paths(seed, num_requests=200, depth=seed % 7 + 1, fan_out=seed % 3 + 2)
    requests = requests_of(paths)
    with Workload.of(requests) as workload:
        for capacity in range(1, workload.num_pages + 2, 5):
            simulate(workload, "auto", capacity, check_every=10)


def test_before_anything_is_known_it_is_lru():
    requests = requests_of(random_paths(5, num_requests=63, depth=5))
    for capacity in (3, 10, 30):
        assert replayed("auto", requests, capacity).hit_pages == replayed("lru", requests, capacity).hit_pages


def test_equal_requests_give_equal_evictions():
    requests = requests_of(hot_and_flood(3, 1000))
    rows = [replayed("auto", requests, 300) for _ in range(2)]
    assert rows[0].hit_pages == rows[1].hit_pages
    assert rows[0].evicted_pages == rows[1].evicted_pages


def test_pages_of_more_tokens_are_evicted_alike():
    clocks, hits = [Clock(), Clock()], [0, 0]
    caches = [PrefixCache(200, size, policy="auto", clock=clock) for size, clock in zip((1, 4), clocks, strict=True)]
    for number, path in enumerate(hot_and_flood(4, 800)):
        for which, (cache, tokens) in enumerate(zip(caches, (path, np.repeat(path, 4)), strict=True)):
            clocks[which].now_s = float(number)
            hits[which] += serve(cache, tokens) // cache.page_size
    assert hits[0] == hits[1] > 0


def test_the_policy_may_change_while_leases_live():
    clock = Clock()
    cache = PrefixCache(200, 1, clock=clock)
    held = []
    for number, path in enumerate(hot_and_flood(5, 900)):
        clock.now_s = float(number)
        serve(cache, path)
        if number % 100 == 50:
            held.append(cache.acquire(np.array(path, np.int32)))
        if number % 150 == 0:
            cache.set_policy(("auto", "lru", "lfu")[number // 150 % 3])
        if len(held) > 2:
            held.pop(0).release()
        cache.check()


def test_a_clock_that_stands_still_or_runs_back_is_borne():
    clock = Clock()
    cache = PrefixCache(100, 1, policy="auto", clock=clock)
    for number, path in enumerate(hot_and_flood(6, 600)):
        clock.now_s = float(-number if number > 300 else 0)
        serve(cache, path)
    cache.check()


def leaf(tick, time_s, mark, start=0, num_pages=4):
    node = Node(Account(b""), None, start, bytearray(), array("i", range(num_pages)))
    node.tick, node.time_s, node.mark = tick, time_s, mark
    return node


def ended(policy, number, tokens, found=0):
    data = np.array(tokens, np.int32).tobytes()
    return policy.ended(Ended(number, float(number), b"", 0, data, 1, len(tokens), found, False))


def test_a_class_that_is_never_used_again_goes_before_an_older_one_that_is():
    policy = Hazard(100)
    for number in range(1, 600):  # short prompts come back after 50 requests, long ones never
        if number % 2:
            short = ended(policy, number, [number % 50, 10**6])
        else:
            long = ended(policy, number, [10**7 + 100 * number + i for i in range(40)])
    old, new = leaf(500, 570.0, short), leaf(560, 590.0, long, num_pages=40)
    policy.add(old)
    policy.add(new)
    assert policy.victim() is new
    policy.discard(new)
    assert policy.victim() is old


def test_a_leaf_that_was_trimmed_to_known_pages_changes_its_class():
    policy = Hazard(100)
    mark = Mark(known=2, known_class=0, fresh_class=1)
    node = leaf(1, 0.0, mark)
    policy.add(node)
    before = policy._rows[node]
    assert policy.victim() is node
    del node.pages[2:]
    assert policy.victim() is node
    assert policy._rows[node] != before
    assert len(policy) == 1


def test_requests_that_end_nowhere_or_repeat_are_learned_from():
    policy = Hazard(4)
    assert ended(policy, 1, []) == Mark(0, 0, 1)
    assert ended(policy, 2, [1, 2, 3]).known == 0
    assert ended(policy, 3, [1, 2, 3], found=3).known == 3
    assert ended(policy, 4, [1, 2, 3, 4, 5, 6], found=3).known == 3


def test_a_sibling_has_leaves_of_its_own_and_learns_with_the_others():
    policy = Hazard(100)
    sibling = policy.sibling()
    for number in range(1, 600):
        if number % 2:
            short = ended(policy, number, [number % 50, 10**6])
        else:
            long = ended(policy, number, [10**7 + 100 * number + i for i in range(40)])
    old, new = leaf(500, 570.0, short), leaf(560, 590.0, long, num_pages=40)
    policy.add(old)
    sibling.add(old)
    sibling.add(new)
    assert (policy.victim(), len(policy), len(sibling)) == (old, 1, 2)
    assert sibling.victim() is new


def hot_and_twice(width: int, distance: int) -> list[list[int]]:
    """In turns of 10,000: a hot set among one-off prompts, then prompts that each come exactly twice, far apart."""
    chance, queue, fresh, made = random.Random(0), deque(), 10**6, []
    for index in range(20_000):
        if index < 10_000 and chance.random() < 0.5:
            name = chance.randrange(100)
        elif index >= 10_000 and queue and queue[0][0] <= index:
            name = queue.popleft()[1]
        else:
            fresh += 1
            name = fresh
            if index >= 10_000:
                queue.append((index + distance, name))
        made.append([name * 10 + page for page in range(width)])
    return made


@pytest.mark.parametrize("width", [1, 2])
def test_prompts_of_one_page_are_guarded_as_well(width):
    found = {}
    for policy in ("lru", "auto"):
        seconds = iter(range(10**6))
        cache = PrefixCache(300 * width, 1, policy=policy, clock=lambda seconds=seconds: float(next(seconds)))
        found[policy] = 0
        for prompt in hot_and_twice(width, 230):
            with cache.acquire(prompt) as lease:
                found[policy] += lease.num_matched
                lease.extend()
                lease.commit()
    assert found["auto"] >= found["lru"] - 0.01 * 20_000 * width
