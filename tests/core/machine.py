"""The state machine that drives the cache beside its model (style.md 12).

Whole pages are drawn from a set of three that share heads, and keys are earlier keys again, cut short or longer: with
plain random tokens nothing would ever be shared, and the machine would be green and empty.
"""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import radixkv.tree
from tests.core.models import NAMESPACES, CountingTree, Ids, World

SITUATIONS = (
    "real inserts",
    "hits",
    "partial-page hits",
    "splits",
    "splits of a leased node",
    "splits of a node two leases lock",
    "releases",
    "evictions",
    "removals",
    "exhaustions",
    "duplicate commits",
    "cursor look-ups",
    "cursor fall-backs",
)

MAX_LEASES = 6
MAX_PAGES_IN_KEY = 6

page = st.integers(0, 2)
few_pages = st.lists(page, max_size=2)
pick = st.integers(0, 63)
tail_length = st.integers(0, 2)
# how to make a key out of an earlier one: which, how many of its pages, what to add, and how much of one page more
keys = st.tuples(pick, st.integers(0, MAX_PAGES_IN_KEY), few_pages, page, tail_length)
namespaces = st.sampled_from(NAMESPACES[:1] * 4 + NAMESPACES[1:])


def page_ids(page_size: int) -> list[Ids]:
    """Three pages: the first two differ in their last token, the third in its first."""
    return [(1,) * page_size, (1,) * (page_size - 1) + (2,), (3,) * page_size]


class CacheMachine(RuleBasedStateMachine):
    """Every public operation, in any order, against the model; all invariants after each."""

    situations: Counter[str] = Counter()

    @initialize(page_size=st.integers(1, 3), num_pages=st.integers(4, 12), wide=st.booleans())
    def begin(self, page_size: int, num_pages: int, wide: bool) -> None:
        self.kept_wide = radixkv.tree._WIDE
        radixkv.tree._WIDE = 1 if wide else self.kept_wide  # so that the sorted neighbour search is driven too
        CountingTree.splits = self.situations
        self.world = World(num_pages, page_size, self.situations)
        self.choices = page_ids(page_size)
        self.keys: list[list[int]] = [[0, 1, 2], [0, 0]]

    def key(self, recipe: tuple[int, int, list[int], int, int]) -> Ids:
        which, keep, more, last, length = recipe
        pages = (self.keys[which % len(self.keys)][:keep] + more)[:MAX_PAGES_IN_KEY]
        self.keys.append(pages)
        del self.keys[:-12]
        return self.ids(pages, last, length)

    def ids(self, pages: list[int], last: int = 0, length: int = 0) -> Ids:
        whole = tuple(token for index in pages for token in self.choices[index])
        return whole + self.choices[last][: min(length, self.world.model.page_size - 1)]

    def held(self, which: int):
        return self.world.model.held[which % len(self.world.model.held)]

    def cursor(self, which: int):
        return self.world.cursors[which % len(self.world.cursors)]

    def may_lease(self) -> bool:
        return len(self.world.model.held) < MAX_LEASES

    def has_lease(self) -> bool:
        return bool(self.world.model.held)

    def has_cursor(self) -> bool:
        return bool(self.world.cursors)

    # -- leases -------------------------------------------------------------------------------------------------------

    @precondition(may_lease)
    @rule(namespace=namespaces, recipe=keys, limit=st.none() | st.integers(-1, 12))
    def acquire(self, namespace, recipe, limit) -> None:
        self.world.acquire(namespace, self.key(recipe), limit)

    @precondition(has_lease)
    @rule(which=pick, more=few_pages, last=page, length=tail_length)
    def extend(self, which, more, last, length) -> None:
        self.world.extend(self.held(which), self.ids(more, last, length))

    @precondition(has_lease)
    @rule(which=pick, short=st.integers(-1, 6))
    def commit(self, which, short) -> None:
        held = self.held(which)
        self.world.commit(held, len(held.ids) - short)

    @precondition(has_lease)
    @rule(which=pick)
    def fill_and_commit(self, which) -> None:
        held = self.held(which)
        if self.world.extend(held):
            self.world.commit(held, len(held.ids))

    @precondition(has_lease)
    @rule(which=pick)
    def release(self, which) -> None:
        self.world.release(self.held(which))

    @precondition(may_lease)
    @rule(namespace=namespaces, recipe=keys)
    def request(self, namespace, recipe) -> None:
        self.world.request(namespace, self.key(recipe))

    # -- taking away --------------------------------------------------------------------------------------------------

    @rule(num_pages=st.integers(0, 4))
    def evict(self, num_pages) -> None:
        self.world.evict(num_pages)

    @rule(namespace=namespaces, recipe=keys)
    def remove(self, namespace, recipe) -> None:
        ids = self.key(recipe)
        if ids:  # all of a namespace at once would leave little to do: flush() is drawn often enough
            self.world.remove(namespace, ids)

    @precondition(lambda self: len(self.world.model.pages) > self.world.model.num_pages // 2)
    @rule()
    def flush(self) -> None:
        self.world.flush()

    # -- cursors ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.world.cursors) < 4)
    @rule(namespace=namespaces, recipe=keys)
    def new_cursor(self, namespace, recipe) -> None:
        self.world.cursor(namespace, self.key(recipe))

    @precondition(lambda self: self.world.cursors and len(self.world.cursors) < 4)
    @rule(which=pick)
    def fork(self, which) -> None:
        self.world.fork(self.cursor(which))

    @precondition(has_cursor)
    @rule(which=pick, more=few_pages, last=page, length=tail_length)
    def append(self, which, more, last, length) -> None:
        self.world.append(self.cursor(which), self.ids(more, last, length))

    @precondition(has_cursor)
    @rule(which=pick, keep=st.integers(0, 12))
    def truncate(self, which, keep) -> None:
        cursor = self.cursor(which)
        self.world.truncate(cursor, min(keep, len(cursor.ids)))

    @precondition(lambda self: self.may_lease() and any(not cursor.busy for cursor in self.world.cursors))
    @rule(which=pick, limit=st.none() | st.integers(0, 12))
    def acquire_cursor(self, which, limit) -> None:
        idle = [cursor for cursor in self.world.cursors if not cursor.busy]
        self.world.acquire_cursor(idle[which % len(idle)], limit)

    @precondition(lambda self: self.may_lease() and any(not cursor.busy for cursor in self.world.cursors))
    @rule(which=pick, more=few_pages)
    def turn(self, which, more) -> None:
        """One turn of a conversation: some tokens more, all of it published."""
        idle = [cursor for cursor in self.world.cursors if not cursor.busy]
        cursor = idle[which % len(idle)]
        if len(cursor.ids) < MAX_PAGES_IN_KEY * self.world.model.page_size:
            self.world.append(cursor, self.ids(more))
        held = self.world.acquire_cursor(cursor)
        if self.world.extend(held):
            self.world.commit(held, len(held.ids))
        self.world.release(held)

    # -- laws ---------------------------------------------------------------------------------------------------------

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            radixkv.tree._WIDE = self.kept_wide
            self.world.close()
