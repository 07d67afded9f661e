"""Laws of `plan`: of one step, of any state; and of many steps, in a world of plain counts that does what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from math import inf

import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from bench.serve.simulate import Arrival, Clock, Simulation, bursts
from radixkv.engine.scheduler import Job, Plan, Rules, State, plan

PAGE = 4
RULES = Rules(
    page_size=PAGE,
    max_running=4,
    step_tokens=32,
    mixed_tokens=16,
    patience_s=5,
    rise_s=10,
    quantum_tokens=64,
    headroom_tokens=4,
)


def tokens(*values: int | Iterable[int]) -> bytes:
    """Token ids as bytes; a number stands for a page of it."""
    pages = [[value] * PAGE if isinstance(value, int) else list(value) for value in values]
    return np.array([token for page in pages for token in page], np.int32).tobytes()


def job(number: int, prompt: bytes, **settings: object) -> Job:
    settings = {"namespace": b"", "num_tokens": len(prompt) // 4, "max_output": 8} | settings
    return Job(number, prompt, **settings)


# -- one step, any state ----------------------------------------------------------------------------------------------

PROMPTS = st.lists(st.sampled_from([1, 2, 3]), min_size=0, max_size=8).flatmap(
    lambda pages: st.integers(0, PAGE - 1).map(lambda rest: tokens(*pages, [4] * rest if pages else [4] * (rest + 1)))
)
ALL_RULES = st.builds(
    lambda mixed, extra, **rest: Rules(page_size=PAGE, mixed_tokens=mixed, step_tokens=mixed + extra, **rest),
    mixed=st.integers(1, 20),
    extra=st.integers(0, 20),
    max_running=st.integers(1, 5),
    chunk=st.sampled_from([1, 1, PAGE, 4 * PAGE]),
    patience_s=st.sampled_from([0.0, 5.0]),
    quantum_tokens=st.sampled_from([1, 64]),
    headroom_tokens=st.sampled_from([0, 4]),
)


@st.composite
def jobs(draw, number: int, now_s: float, chunk: int, *, runs: bool) -> Job:
    prompt = draw(PROMPTS)
    num_prompt = len(prompt) // 4
    one = job(
        number,
        prompt,
        namespace=draw(st.sampled_from([b"a", b"b"])),
        num_tokens=num_prompt + draw(st.integers(0, 6)),
        max_output=draw(st.integers(1, 6)),
        tenant=draw(st.sampled_from(["x", "y"])),
        priority=draw(st.integers(-1, 2)),
        affinity=draw(st.sampled_from(["", "z"])),
        arrived_s=now_s - draw(st.sampled_from([0.0, 1.0, 6.0, 100.0])),
        deadline_at_s=draw(st.sampled_from([inf, inf, now_s, now_s + 3])),
        paged=draw(st.sampled_from([True, True, True, False])),
    )
    if runs:
        one.position = draw(st.integers(0, one.num_tokens - 1))
        if one.position < num_prompt:
            one.position -= one.position % chunk
        if one.paged:
            held = -(-one.position // PAGE)
            one.num_pages = draw(st.integers(held, -(-one.num_tokens // PAGE)))
            one.num_found = draw(st.integers(0, one.position // PAGE))
    else:
        one.resumed = one.num_tokens > num_prompt
        if one.paged:
            one.num_cached = draw(st.integers(0, num_prompt))
            one.num_locked = draw(st.integers(0, one.num_cached))
            one.room_pages = draw(st.sampled_from([None, None, 0, 3, 50]))
    return one


@st.composite
def situations(draw) -> tuple[State, Rules]:
    rules, now_s = draw(ALL_RULES), 1000.0
    num_running = draw(st.integers(0, rules.max_running))
    running = [draw(jobs(number, now_s, rules.chunk, runs=True)) for number in range(num_running)]
    waiting = [draw(jobs(10 + number, now_s, rules.chunk, runs=False)) for number in range(draw(st.integers(0, 6)))]
    credit = draw(st.dictionaries(st.sampled_from(["x", "y", "gone"]), st.integers(-300, 64).map(float)))
    return State(waiting, running, draw(st.integers(0, 30)), draw(st.integers(0, 30)), now_s, credit), rules


def live(state: State) -> list[Job]:
    return [one for one in (*state.running, *state.waiting) if one.deadline_at_s > state.now_s]


def decoding(one: Job) -> bool:
    return not one.prefilling and one.remaining == 1


def own(one: Job) -> int:
    return one.num_pages - one.num_found


@given(situations())
def test_a_plan_is_a_function_of_the_state_and_changes_nothing(situation):
    state, rules = situation
    before = [(vars_of(one)) for one in (*state.waiting, *state.running)], dict(state.credits)
    first = plan(state, rules)
    assert ([vars_of(one) for one in (*state.waiting, *state.running)], dict(state.credits)) == before
    assert plan(state, rules) == first
    assert plan(deepcopy(state), rules) == first
    state.waiting = list(reversed(state.waiting))
    other = plan(state, rules)
    assert replace(other, overdue=tuple(sorted(other.overdue))) == replace(first, overdue=tuple(sorted(first.overdue)))


def vars_of(one: Job) -> tuple[object, ...]:
    return tuple(getattr(one, name) for name in Job.__slots__)


@given(situations())
def test_every_job_is_in_at_most_one_place(situation):
    state, rules = situation
    todo = plan(state, rules)
    running, waiting = {one.id for one in state.running}, {one.id for one in state.waiting}
    worked = [share.job_id for share in todo.work]
    assert set(todo.overdue) == (running | waiting) - {one.id for one in live(state)}
    assert set(todo.preempted) <= running and set(todo.admitted) <= waiting
    active = (running | set(todo.admitted)) - set(todo.overdue) - set(todo.preempted)
    assert set(worked) <= active and set(todo.followers) <= active
    for names in (todo.overdue, todo.preempted, todo.admitted, worked, todo.followers):
        assert len(set(names)) == len(names)
    assert not set(worked) & set(todo.followers), "who follows computes nothing"
    assert not set(todo.overdue) & {*todo.preempted, *todo.admitted}
    assert len(active) <= rules.max_running
    assert set(todo.credits) == {one.tenant for one in live(state)}


@given(situations())
def test_a_step_stays_within_its_tokens_and_every_decoding_job_gets_one_first(situation):
    state, rules = situation
    todo = plan(state, rules)
    by_id = {one.id: one for one in live(state)}
    ready = [one.id for one in state.running if one.id in by_id and decoding(one) and one.id not in todo.preempted]
    assert [share.job_id for share in todo.work[: len(ready)]] == ready
    assert all(share.num_tokens == 1 for share in todo.work[: len(ready)])
    total = sum(share.num_tokens for share in todo.work)
    if ready:
        assert total <= max(rules.mixed_tokens, len(ready) + (rules.chunk if rules.chunk > 1 else 0))
    elif rules.chunk == 1:
        assert total <= rules.step_tokens + rules.step_tokens // 2
    else:
        assert total <= max(rules.step_tokens, rules.chunk)
    for share in todo.work:
        one = by_id[share.job_id]
        start = one.position if share.job_id not in todo.admitted else starts_at(one, rules)
        assert 1 <= share.num_tokens <= one.num_tokens - start
        end = start + share.num_tokens
        if rules.chunk > 1 and end < one.num_tokens and start * 4 < len(one.prompt):
            assert end % rules.chunk == 0, "whole chunks, but for the last one"


def starts_at(one: Job, rules: Rules) -> int:
    return min(one.num_cached, one.num_tokens - 1) // rules.chunk * rules.chunk


@given(situations())
def test_there_is_always_progress(situation):
    state, rules = situation
    assume(live(state))
    todo = plan(state, rules)
    assert todo.work or todo.preempted


@given(situations())
def test_no_more_pages_are_asked_for_than_can_be_had_unless_one_runs_alone(situation):
    state, rules = situation
    todo = plan(state, rules)
    gone = {*todo.overdue, *todo.preempted}
    had = state.num_free + state.num_evictable + sum(own(one) for one in state.running if one.id in gone and one.paged)
    kept = [one for one in state.running if one.id not in gone and one.paged]
    ready = [one for one in kept if decoding(one)]
    needed = sum(max(rules.pages(one.num_tokens) - one.num_pages, 0) for one in ready)
    assert needed <= had or len(kept) <= 1
    started = [one for one in state.waiting if one.id in todo.admitted and one.paged]
    leaders = [one for one in started if one.id not in todo.followers]
    if len(leaders) == len(started) and len(kept) + len(started) > 1:
        for one in started:
            found = one.num_cached // PAGE
            needed += max(rules.pages(one.num_tokens) - found, 0) + -(-(one.num_cached - one.num_locked) // PAGE)
        alone_before = not [one for one in state.running if one.id not in gone]
        assert needed <= had or alone_before


@given(situations())
def test_whoever_is_preempted_ranks_below_all_of_its_tenant_that_go_on(situation):
    state, rules = situation
    todo = plan(state, rules)
    kept = [one for one in live(state) if one in state.running and one.id not in todo.preempted and one.paged]
    highest = max((one.priority for one in live(state)), default=0)

    def rank(one: Job) -> tuple[float, ...]:
        risen = int((state.now_s - one.arrived_s) / rules.rise_s)
        return (min(one.priority + risen, highest), -one.arrived_s, -one.id)

    preempted = [one for one in state.running if one.id in todo.preempted]
    for victim in preempted:
        assert all(rank(victim) < rank(other) for other in kept if other.tenant == victim.tenant)


# -- many steps -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Life:
    """A job, all tokens it will ever have, and what it holds."""

    job: Job
    sequence: bytes
    answer: int
    published: int = 0  # pages
    reserved: int = 0  # pages
    computed: int = 0
    preemptions: int = 0
    started_s: float | None = None
    ended_s: float | None = None
    overdue: bool = False

    def key(self, page: int) -> tuple[bytes, bytes]:
        return self.job.namespace, self.sequence[: (page + 1) * PAGE * 4]


class World:
    """Does what plans say, with pages that are counts and a tree that is a dict from each whole-page prefix to its locks."""

    def __init__(self, rules: Rules = RULES, num_pages: int = 64, step_s: float = 0.1) -> None:
        self.rules, self.num_pages, self.num_free, self.step_s = rules, num_pages, num_pages, step_s
        self.tree: Counter[tuple[bytes, bytes]] = Counter()
        self.waiting: dict[int, Life] = {}
        self.running: dict[int, Life] = {}
        self.ended: list[Life] = []
        self.credits: dict[str, float] = {}
        self.served: Counter[str] = Counter()
        self.now_s = 0.0
        self.num_steps = 0
        self._next = 0

    def add(self, prompt: bytes, answer: int = 4, **settings: object) -> Life:
        self._next += 1
        one = job(self._next, prompt, arrived_s=self.now_s, max_output=answer, **settings)
        life = Life(one, prompt + tokens([1000 + self._next] * answer), answer)
        self.waiting[one.id] = life
        return life

    def step(self) -> Plan:
        for life in self.waiting.values():
            self._probe(life)
        evictable = sum(1 for locks in self.tree.values() if not locks)
        waiting, running = ([life.job for life in lives.values()] for lives in (self.waiting, self.running))
        todo = plan(State(waiting, running, self.num_free, evictable, self.now_s, self.credits), self.rules)
        self.credits = todo.credits
        for number in todo.overdue:
            life = self.running.get(number) or self.waiting[number]
            life.overdue = True
            self._end(life)
        for number in todo.preempted:
            self._preempt(self.running[number])
        for number in todo.admitted:
            self._begin(self.waiting.pop(number))
        for share in todo.work:
            if share.job_id in self.running:
                self._compute(self.running[share.job_id], share.num_tokens)
        for number in todo.followers:
            if number in self.running:
                self._attach(self.running[number])
        self.now_s += self.step_s
        self.num_steps += 1
        held = sum(life.reserved for life in self.running.values())
        assert self.num_free >= 0 and self.num_free + len(self.tree) + held == self.num_pages
        return todo

    def run(self, max_steps: int = 2000) -> None:
        while self.waiting or self.running:
            assert self.num_steps < max_steps, "somebody starves"
            self.step()

    def _probe(self, life: Life) -> None:
        one, num_found = life.job, 0
        if not one.paged:
            return
        while (num_found + 1) * PAGE * 4 <= len(one.prompt) and life.key(num_found) in self.tree:
            num_found += 1
        one.num_cached = num_found * PAGE
        one.num_locked = sum(1 for page in range(num_found) if self.tree[life.key(page)]) * PAGE

    def _begin(self, life: Life) -> None:
        one = life.job
        self.running[one.id] = life
        life.started_s = self.now_s if life.started_s is None else life.started_s
        while one.paged and (life.published + 1) * PAGE < one.num_tokens and life.key(life.published) in self.tree:
            self.tree[life.key(life.published)] += 1
            life.published += 1
        one.position = life.published * PAGE // self.rules.chunk * self.rules.chunk
        one.num_found = one.num_pages = life.published

    def _attach(self, life: Life) -> None:
        one = life.job
        while (life.published + 1) * PAGE < one.num_tokens and life.key(life.published) in self.tree:
            self.tree[life.key(life.published)] += 1
            life.published += 1
            if life.reserved:
                life.reserved, self.num_free = life.reserved - 1, self.num_free + 1
        one.position = max(one.position, life.published * PAGE // self.rules.chunk * self.rules.chunk)
        one.num_found, one.num_pages = life.published, life.published + life.reserved

    def _compute(self, life: Life, count: int) -> None:
        one = life.job
        count = min(count, one.remaining)  # it may have found more than it was planned with
        stop = one.num_tokens if one.prefilling else one.position + count
        if not self._reserve(life, max(self.rules.pages(stop) - life.published - life.reserved, 0)):
            return
        one.position += count
        life.computed += count
        self.served[one.tenant] += count
        whole = one.position // PAGE
        if self.rules.chunk > 1:
            whole = min(one.position, len(one.prompt) // 4) // self.rules.chunk * self.rules.chunk // PAGE
        while one.paged and life.published < whole:
            if life.key(life.published) in self.tree:
                self.num_free += 1
            self.tree[life.key(life.published)] += 1
            life.published, life.reserved = life.published + 1, life.reserved - 1
        one.num_pages = life.published + life.reserved
        if one.position == one.num_tokens:
            one.num_tokens, one.max_output = one.num_tokens + 1, one.max_output - 1
            if one.max_output == 0:
                self._end(life)

    def _reserve(self, life: Life, num_pages: int) -> bool:
        """As the engine does: free pages, evicted ones, and where both fail, those of the last in rank."""
        if not life.job.paged:
            return True
        while self.num_free < num_pages:
            idle = [key for key, locks in self.tree.items() if not locks]
            if idle:
                del self.tree[max(idle, key=lambda key: len(key[1]))]
                self.num_free += 1
                continue
            holders = [other for other in self.running.values() if other.job.paged]
            assert len(holders) > 1, "a request that has the pool to itself fails for want of pages"
            victim = min(holders, key=lambda other: (other.job.priority, -other.job.arrived_s, -other.job.id))
            self._preempt(victim)
            if victim is life:
                return False
        self.num_free -= num_pages
        life.reserved += num_pages
        life.job.num_pages = life.published + life.reserved
        return True

    def _preempt(self, life: Life) -> None:
        self._let_go(life)
        del self.running[life.job.id]
        self.waiting[life.job.id] = life
        life.preemptions += 1
        one = life.job
        one.position = one.num_pages = one.num_found = 0
        one.resumed = True

    def _end(self, life: Life) -> None:
        self._let_go(life)
        self.running.pop(life.job.id, None)
        self.waiting.pop(life.job.id, None)
        life.ended_s = self.now_s
        self.ended.append(life)

    def _let_go(self, life: Life) -> None:
        for page in range(life.published):
            self.tree[life.key(page)] -= 1
        self.num_free += life.reserved
        life.published = life.reserved = 0


WORKLOADS = st.lists(
    st.tuples(
        PROMPTS,
        st.integers(1, 12),  # answer
        st.integers(0, 6),  # steps after the one before
        st.fixed_dictionaries(
            {},
            optional={
                "namespace": st.just(b"b"),
                "tenant": st.sampled_from(["x", "y"]),
                "priority": st.integers(-2, 2),
                "paged": st.just(False),
                "affinity": st.just("z"),
            },
        ),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    WORKLOADS,
    st.integers(12, 40),
    st.sampled_from([1, PAGE, 4 * PAGE]),
    st.sampled_from([8, 16]),
    st.sampled_from([0.01, 1.0]),
    st.integers(1, 4),
)
def test_every_job_ends_whatever_comes_and_however_few_the_pages(
    workload, num_pages, chunk, mixed_tokens, step_s, max_running
):
    rules = replace(RULES, chunk=chunk, mixed_tokens=mixed_tokens, max_running=max_running)
    world = World(rules, num_pages, step_s)  # the longest job needs 11 pages
    lives = []
    for prompt, answer, pause, options in workload:
        lives.append(world.add(prompt, answer, **options))
        for _ in range(pause):
            world.step()
    work = sum(len(prompt) // 4 + answer for prompt, answer, _, _ in workload)
    world.run(max_steps=200 + 20 * work)
    assert len(world.ended) == len(lives)
    assert all(life.job.max_output == 0 for life in lives)
    assert not any(world.tree.values())


def prompts(count: int, pages: int, seed: int = 0) -> list[bytes]:
    """Prompts that have nothing in common."""
    return [tokens(*range(100 * number, 100 * number + pages)) for number in range(seed * 1000 + 1, seed * 1000 + 1 + count)]


def test_a_cold_prompt_is_not_kept_waiting_by_a_flood_of_cached_ones():
    world = World(replace(RULES, max_running=2), num_pages=200)
    hot = tokens(*range(1, 9))
    world.add(hot)
    world.run()
    cold = None
    for step in range(200):
        world.add(hot + tokens([10, 11]), answer=2)
        if step == 20:
            cold = world.add(tokens(*range(50, 56)))
        world.step()
    assert cold is not None and cold.started_s is not None and cold.ended_s is not None
    assert cold.started_s - cold.job.arrived_s <= RULES.patience_s + 1
    assert cold.started_s - cold.job.arrived_s > 1, "the flood was heavy enough to matter"


def test_a_short_prompt_does_not_wait_behind_a_long_one_unless_that_has_waited_too_long():
    long, short = prompts(1, 40)[0], tokens(9001)
    running = job(1, long, position=8, num_pages=40)
    for now_s, first in ((1.0, 2), (RULES.patience_s, 1)):
        todo = plan(State([job(2, short, arrived_s=now_s)], [running], 100, 0, now_s), RULES)
        assert todo.work[0].job_id == first
        assert sum(share.num_tokens for share in todo.work) == RULES.step_tokens


@pytest.mark.parametrize("max_running", [1, 3])
def test_a_flood_of_high_priority_holds_nobody_back_for_ever_and_is_not_held_back_itself(max_running):
    world = World(replace(RULES, max_running=max_running, rise_s=2.0), num_pages=60)
    low = world.add(*prompts(1, 12, seed=1), answer=20)
    for number, prompt in enumerate(prompts(150, 4)):
        world.add(prompt, answer=2, priority=5)
        world.step()
        assert number < 10 or len(world.ended) > number * 0.2, "those of high priority go on"
    assert low.started_s is not None and low.ended_s is not None
    assert low.ended_s <= 5 * 2.0 + RULES.patience_s
    assert low.preemptions <= 4, "what was let in goes on, and is not put back at once"


def test_high_priority_makes_low_priority_give_way_and_loses_none_of_its_work():
    world = World(replace(RULES, max_running=1), num_pages=60)
    low = world.add(*prompts(1, 12, seed=1), answer=40)
    for _ in range(10):
        world.step()
    high = world.add(*prompts(1, 3, seed=2), priority=1)
    world.run()
    assert high.ended_s is not None and low.ended_s is not None and high.ended_s < low.ended_s
    assert low.preemptions == 1
    assert low.computed <= 12 * PAGE + 40 + PAGE, "whole pages were kept"


def backlogged(answer_x: int, answer_y: int, **rules: object) -> World:
    """Two tenants who always have more to ask; one asks five times as much at once."""
    world = World(replace(RULES, **rules), num_pages=300)
    sources = {"x": iter(prompts(2000, 6, seed=1)), "y": iter(prompts(2000, 6, seed=20))}
    for _ in range(300):
        for tenant, depth, answer in (("x", 40, answer_x), ("y", 8, answer_y)):
            queued = sum(1 for life in world.waiting.values() if life.job.tenant == tenant)
            for _ in range(depth - queued):
                world.add(next(sources[tenant]), answer, tenant=tenant)
        world.step()
    return world


@pytest.mark.parametrize(("answer_x", "answer_y"), [(2, 2), (12, 2), (2, 12)])
def test_two_tenants_who_always_wait_are_served_alike(answer_x, answer_y):
    world = backlogged(answer_x, answer_y, quantum_tokens=64)
    longest = 6 * PAGE + max(answer_x, answer_y)
    assert sum(world.served.values()) > 20 * 64
    assert abs(world.served["x"] - world.served["y"]) <= 2 * 64 + RULES.max_running * longest


def test_a_tenant_that_holds_all_places_gives_one_to_whoever_has_none_and_has_waited_long():
    world = World(replace(RULES, max_running=3), num_pages=400)
    held = [world.add(prompt, answer=300, tenant="x") for prompt in prompts(5, 2)]
    for _ in range(5):
        world.step()
    light = world.add(*prompts(1, 2, seed=1), answer=2, tenant="y")
    while light.ended_s is None:
        world.step()
        assert world.now_s < 60
    assert light.ended_s - light.job.arrived_s <= RULES.patience_s + 6 * world.step_s
    assert sum(one.preemptions for one in held) == 1
    world.run()
    assert all(one.ended_s is not None for one in held)


def test_no_priority_takes_anything_from_another_tenant():
    world = World(replace(RULES, max_running=3), num_pages=400)
    modest = world.add(*prompts(1, 2, seed=1), answer=50, tenant="y")
    world.step()
    for prompt in prompts(60, 4):
        world.add(prompt, answer=4, tenant="x", priority=100)
        world.step()
    assert modest.preemptions == 0 and modest.ended_s is not None


def test_a_light_tenant_waits_for_a_quantum_and_not_for_the_queue():
    world = World(replace(RULES, max_running=2), num_pages=200)
    for prompt in prompts(100, 6):
        world.add(prompt, tenant="flood")
    for _ in range(5):
        world.step()
    light = world.add(*prompts(1, 6, seed=30), tenant="light")
    world.run()
    assert light.started_s is not None
    before = sum(1 for life in world.ended if life.ended_s < light.started_s)
    assert before <= 8, "of the hundred that waited before it"


def test_a_tenant_does_not_pay_for_what_it_had_while_nobody_else_asked():
    world = World(replace(RULES, max_running=2), num_pages=200)
    for prompt in prompts(2, 4):
        world.add(prompt, 120, tenant="early")
    for _ in range(100):
        world.step()
    for prompt in prompts(40, 4, seed=3):
        world.add(prompt, 2, tenant="late")
    early = world.add(*prompts(1, 4, seed=9), answer=2, tenant="early")
    world.run()
    before = sum(1 for life in world.ended if life.job.tenant == "late" and life.ended_s < early.started_s)
    assert before <= 8


def test_whose_time_is_over_ends_in_that_step_whether_it_waits_or_runs():
    world = World(replace(RULES, max_running=1), num_pages=60)
    runs = world.add(*prompts(1, 4), answer=100, deadline_at_s=1.05)
    world.step()
    waits = world.add(*prompts(1, 4, seed=1), deadline_at_s=0.55)
    world.run()
    assert runs.overdue and 1.05 <= runs.ended_s < 1.15 and waits.overdue and 0.55 <= waits.ended_s < 0.65
    assert waits.started_s is None and 0 < runs.computed < 116


def test_a_near_deadline_comes_first():
    world = World(replace(RULES, max_running=1), num_pages=60)
    others = [world.add(prompt) for prompt in prompts(5, 4)]
    near = world.add(*prompts(1, 4, seed=1), deadline_at_s=3.0)
    world.run()
    assert near.started_s == 0.0 and not near.overdue
    assert all(life.started_s > 0.0 for life in others)


def test_where_pages_run_out_the_last_come_makes_room_and_all_end():
    world = World(RULES, num_pages=30)
    lives = [world.add(prompt, answer=40) for prompt in prompts(6, 3)]
    world.run()
    assert sum(life.preemptions for life in lives) > 0
    assert lives[0].preemptions == 0, "the first come is never the one"
    assert sum(life.computed for life in lives) <= 2 * 6 * (12 + 40)


def test_a_pool_that_holds_one_request_serves_them_all_one_by_one():
    world = World(RULES, num_pages=11)
    lives = [world.add(prompt, answer=12) for prompt in prompts(8, 8)]
    world.run(max_steps=400)
    assert len(world.ended) == 8
    assert sum(life.computed for life in lives) <= 2 * 8 * (32 + 12)


def test_in_exact_mode_prefills_go_on_beside_those_who_decode_even_with_chunks_longer_than_a_step():
    world = World(replace(RULES, chunk=16, mixed_tokens=8), num_pages=200)
    world.add(*prompts(1, 2), answer=60)
    for _ in range(3):
        world.step()
    long = world.add(*prompts(1, 12, seed=1), answer=1)
    for _ in range(4):
        world.step()
    assert long.ended_s is not None


def test_copies_of_one_prompt_compute_it_once():
    world = World(replace(RULES, max_running=8), num_pages=100)
    prompt = tokens(*range(1, 21), [99])
    copies = [world.add(prompt, answer=1) for _ in range(8)]
    world.run()
    assert sum(life.computed for life in copies) == 81 + 7, "the first all of it, each other one the last token"
    assert len({life.started_s for life in copies}) == 1


def test_a_follower_goes_on_alone_when_its_leader_is_taken_away():
    world = World(num_pages=100)
    prompt = tokens(*range(1, 41), [99])
    leader, follower = world.add(prompt, answer=1), world.add(prompt, answer=1)
    todo = world.step()
    assert todo.followers == (follower.job.id,)
    world.step()
    done = leader.job.position
    world._end(leader)
    world.run()
    assert 0 < done < 161 and leader.computed + follower.computed == 161


def test_subtrees_are_walked_one_after_another_each_depth_first():
    rng = np.random.default_rng(0)
    paths = [(top, middle, leaf) for top in (1, 2, 3) for middle in (1, 2) for leaf in (1, 2, 3)]
    waiting = []
    for number, place in enumerate(rng.permutation(len(paths))):
        top, middle, leaf = paths[place]
        waiting.append(job(number, tokens(10 + top, 20 + middle, 30 + leaf, [5])))
    state = State(waiting, [], 1000, 0, 0.0)
    todo = plan(state, replace(RULES, max_running=100, step_tokens=10_000))
    order = [waiting[number].prompt for number in todo.admitted]
    assert order == sorted(order) and len(order) == len(paths)


def test_equal_affinity_is_admitted_together_where_nothing_else_decides():
    waiting = [job(n, prompt, affinity="ab"[n % 2]) for n, prompt in enumerate(prompts(8, 2))]
    todo = plan(State(waiting, [], 1000, 0, 0.0), replace(RULES, max_running=100, step_tokens=10_000))
    assert [waiting[n].affinity for n in todo.admitted] == list("aaaabbbb")


# -- with the real cache, as the benchmark replays traces -------------------------------------------------------------


def replayed(arrivals: list[Arrival], num_pages: int, *, attach: bool = True, **rules: object) -> Simulation:
    settings = {"page_size": 16, "max_running": 4, "step_tokens": 512, "mixed_tokens": 128, "headroom_tokens": 4} | rules
    world = Simulation(num_pages, Rules(**settings), Clock(0.005, 1e-5), attach=attach)
    world.run(arrivals)
    assert len(world.ended) == len(arrivals)
    return world


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_pages", [300, 420, 1000])
def test_the_cache_aware_order_never_finds_less_than_first_come_first_served(seed, num_pages):
    rng = np.random.default_rng(seed)
    heads = [rng.integers(0, 1000, 160 * 4, dtype=np.int32) for _ in range(5)]
    asked = rng.permutation(np.repeat(np.arange(5), 6))
    arrivals = [Arrival(0.0, np.concatenate([heads[n], rng.integers(0, 1000, 40, dtype=np.int32)]), 4) for n in asked]
    aware, plain = replayed(arrivals, num_pages, patience_s=60.0), replayed(arrivals, num_pages, patience_s=0.0)
    hits, plain_hits = (sum(one.num_hit for one in world.ended) for world in (aware, plain))
    assert hits >= plain_hits
    assert hits >= 5 * 5 * 640, "each head is computed once, however few the pages"


def test_following_another_saves_what_would_be_computed_twice_at_once():
    arrivals = list(bursts(seed=0, num_bursts=4))
    follows, alone = (replayed(arrivals, 8192, attach=attach, max_running=16) for attach in (True, False))
    assert follows.num_computed < alone.num_computed
