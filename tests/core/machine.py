"""What drives the cache beside its model (style.md 12): one set of steps, two drivers.

    Walk            a World, and every public operation as a step that takes its choices out of one number
    walk(seed)      steps by random.Random: ten times as many a second; what the mutants are judged by
    CacheMachine    the same steps as rules of hypothesis, which shrinks what it finds

Whole pages are drawn from a set of three that share heads, and keys are earlier keys again, cut short or longer: with
plain random tokens nothing would ever be shared, and the walk would be green and empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import ClassVar

import hypothesis.strategies as st
from hypothesis import note
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import radixkv.tree
from radixkv.namespace import Namespace
from tests.conftest import NATIVE
from tests.core.models import NAMESPACES, CountingTree, CursorModel, HeldModel, Ids, World

_SEEN_IN_SOURCE = ("splits", "splits of a leased node", "splits of a node two leases lock")

SITUATIONS = (
    "real inserts",
    "hits",
    "partial-page hits",
    *(() if NATIVE else _SEEN_IN_SOURCE),
    "releases",
    "evictions",
    "removals",
    "exhaustions",
    "duplicate commits",
    "cursor look-ups",
    "cursor fall-backs",
    "attached pages",
    "reserved pages given back by attaching",
)

MAX_LEASES = 5
MAX_CURSORS = 4
MAX_PAGES_IN_KEY = 6
NUMBERS = 2**24


class Choices:
    """Small choices out of one number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def below(self, limit: int) -> int:
        self.number, chosen = divmod(self.number, limit)
        return chosen

    def one(self, of):
        return of[self.below(len(of))]


class Walk:
    """A World and the steps through it; each step leaves the world checked against its model."""

    def __init__(self, choices: Choices, situations: Counter[str], say: Callable[[str], object]) -> None:
        self.kept_wide = radixkv.tree._WIDE
        radixkv.tree._WIDE = choices.one((self.kept_wide, 1))  # so that the sorted neighbour search is driven too
        size, num_pages = choices.one((2, 1, 3)), choices.one((8, 5, 6, 7, 10, 12))
        say(f"World(num_pages={num_pages}, page_size={size})")
        self.say, self.sound = say, True
        CountingTree.splits = situations
        self.world = World(num_pages, size, situations)
        # the first two differ in their last token, the third in its first
        self.pages: list[Ids] = [(1,) * size, (1,) * (size - 1) + (2,), (3,) * size]
        self.keys: list[tuple[str | Namespace, Ids]] = [("", self.pages[0] + self.pages[1] + self.pages[2])]
        self.world.cursor("", ())
        self.world.cursor("", self.keys[0][1])

    def step(self, name: str, number: int) -> None:
        self.sound = False
        getattr(self, name)(Choices(number))
        self.world.check()
        self.sound = True

    def close(self) -> None:
        """Give everything back, unless the world is broken already: then that is the news."""
        radixkv.tree._WIDE = self.kept_wide
        if self.sound:
            self.world.close()

    # -- choices ------------------------------------------------------------------------------------------------------

    def some(self, choices: Choices) -> Ids:
        """Up to two pages, and up to most of one more."""
        more = sum((choices.one(self.pages) for _ in range(choices.below(3))), ())
        return more + choices.one(self.pages)[: min(choices.one((0, 0, 1, 2)), self.world.model.page_size - 1)]

    def key(self, choices: Choices) -> tuple[str | Namespace, Ids]:
        """An earlier key, a cursor's or a cached one: as it was, cut short, made longer, or in another namespace."""
        namespace, base = choices.one(self.bases(choices.one(("earlier", "cursor", "cached", "cached"))))
        size = self.world.model.page_size
        kept = base[: max(0, len(base) // size - choices.one((0, 0, 1, 2))) * size]
        ids = (kept + self.some(choices))[: MAX_PAGES_IN_KEY * size + 1]
        namespace = choices.one((namespace,) * 5 + NAMESPACES)
        self.keys = [*self.keys[-7:], (namespace, ids)]
        self.say(f"key = {namespace!r}, {ids}")
        return namespace, ids

    def bases(self, where: str) -> list[tuple[str | Namespace, Ids]]:
        if where == "cursor":
            return [(cursor.namespace, cursor.ids) for cursor in self.world.cursors]
        if where == "cached" and self.world.model.pages:
            return [(self.world.names[name], ids) for name, ids in self.world.model.pages]
        return self.keys

    def held(self, choices: Choices) -> HeldModel:
        held = choices.one(self.world.model.held)
        self.say(f"lease = {held.lease}")
        return held

    def cursor(self, choices: Choices, *, idle: bool = False) -> CursorModel:
        cursor = choices.one([cursor for cursor in self.world.cursors if not (idle and cursor.busy)])
        self.say(f"cursor = {cursor.namespace!r}, {cursor.ids} cached to page {cursor.reached}")
        return cursor

    def always(self) -> bool:
        return True

    def may_lease(self) -> bool:
        return len(self.world.model.held) < MAX_LEASES

    def has_lease(self) -> bool:
        return bool(self.world.model.held)

    def may_lease_a_cursor(self) -> bool:
        return self.may_lease() and any(not cursor.busy for cursor in self.world.cursors)

    def may_add_a_cursor(self) -> bool:
        return len(self.world.cursors) < MAX_CURSORS

    def has_pages(self) -> bool:
        return bool(self.world.model.pages)

    def is_half_full(self) -> bool:
        return len(self.world.model.pages) > self.world.model.num_pages // 2

    # -- leases -------------------------------------------------------------------------------------------------------

    def acquire(self, choices: Choices) -> None:
        limit = choices.one((None, None, None, *range(-1, 8)))
        self.world.acquire(*self.key(choices), limit)

    def extend(self, choices: Choices) -> None:
        held = self.held(choices)
        self.world.extend(held, self.some(choices), choices.one((0, 0, 0, 1, 3)))

    def commit(self, choices: Choices) -> None:
        held = self.held(choices)
        if choices.below(2):
            self.world.extend(held)
        self.world.commit(held, len(held.ids) - choices.one((0, 0, 0, 1, 2, 3, -1)))

    def release(self, choices: Choices) -> None:
        self.world.release(self.held(choices))

    def request(self, choices: Choices) -> None:
        self.world.request(*self.key(choices))

    def look(self, choices: Choices) -> None:
        """A request that finds its prefix and goes, having computed nothing."""
        self.world.release(self.world.acquire(*self.key(choices)))

    def rival(self, choices: Choices) -> None:
        """A request that goes on otherwise where a conversation's cached prefix ends now."""
        self._rival(self.cursor(choices), choices)

    def _rival(self, cursor: CursorModel, choices: Choices) -> None:
        whole, _ = self.world.model.match(cursor.name, cursor.ids)
        self.world.request(
            cursor.namespace,
            cursor.ids[: whole * self.world.model.page_size] + choices.one(self.pages) + self.some(choices),
        )

    def race(self, choices: Choices) -> None:
        """Two compute the same: the first is overtaken, pages are short meanwhile, and then it publishes."""
        namespace, ids = self.key(choices)
        held = self.world.acquire(namespace, ids)
        filled = self.world.extend(held)
        self.world.request(namespace, ids[: len(ids) - choices.one((0, 0, self.world.model.page_size))])
        self.world.evict(choices.one((1, 0)))
        if filled:
            self.world.commit(held, len(ids))
        if choices.below(4):
            self.world.release(held)

    def attach(self, choices: Choices) -> None:
        """A lease takes over what is there now; half the time another has just published what it has reserved pages for."""
        held, limit = self.held(choices), choices.one((None, None, *range(8)))
        if choices.below(2) and self.may_lease():
            self.world.extend(held)
            self.world.request(self.world.names[held.name], held.ids)
        self.world.attach(held, limit)

    def follow(self, choices: Choices) -> None:
        """A request waits for another that computes what they share, and takes it over page by page."""
        namespace, ids = self.key(choices)
        ids = choices.one(self.pages) + ids[: 2 * self.world.model.page_size] if choices.below(2) else ids
        held = self.world.acquire(namespace, ids)
        if choices.below(8):
            self.world.extend(held)
        self.world.request(namespace, ids + choices.one(((), (1,))))
        self.world.attach(held)
        if self.world.extend(held):
            self.world.commit(held, len(held.ids))
        if choices.below(4):
            self.world.release(held)

    # -- taking away --------------------------------------------------------------------------------------------------

    def evict(self, choices: Choices) -> None:
        self.world.evict(choices.one((1, 1, 1, 2, 3, 0)))

    def squeeze(self, choices: Choices) -> None:
        """Evict, page by page, until a conversation has lost the end of what it had; perhaps a rival grows there.

        Then, perhaps, the conversation goes on.
        """
        cursor = self.cursor(choices)
        whole, _ = self.world.model.match(cursor.name, cursor.ids)
        for _ in range(self.world.model.num_pages):
            if whole and self.world.model.match(cursor.name, cursor.ids)[0] == whole:
                self.world.evict(1)
        if choices.below(2) and self.may_lease():
            self._rival(cursor, choices)
        if choices.below(2) and self.may_lease() and not cursor.busy:
            self.world.release(self.world.acquire_cursor(cursor))

    def remove(self, choices: Choices) -> None:
        namespace, ids = choices.one(self.bases("cached"))
        cut = choices.one((1, 1, 2, 3, 0))
        self.world.remove(namespace, ids[: max(1, len(ids) - cut)] + self.some(choices) * (cut == 0))
        self.world.evict(choices.below(3))  # whose turn is it, now that the parents are leaves?

    def flush(self, choices: Choices) -> None:
        self.world.flush()

    # -- cursors ------------------------------------------------------------------------------------------------------

    def new_cursor(self, choices: Choices) -> None:
        if choices.below(2):
            self.world.fork(self.cursor(choices))
        else:
            self.world.cursor(*self.key(choices))

    def append(self, choices: Choices) -> None:
        cursor = self.cursor(choices)
        if len(cursor.ids) < MAX_PAGES_IN_KEY * self.world.model.page_size:
            self.world.append(cursor, self.some(choices))

    def truncate(self, choices: Choices) -> None:
        cursor = self.cursor(choices)
        self.world.truncate(cursor, choices.below(len(cursor.ids) + 1))

    def acquire_cursor(self, choices: Choices) -> None:
        self.world.acquire_cursor(self.cursor(choices, idle=True), choices.one((None, None, None, *range(8))))

    def turn(self, choices: Choices) -> None:
        """One turn of a conversation: some tokens more, all of it published."""
        cursor = self.cursor(choices, idle=True)
        if len(cursor.ids) < MAX_PAGES_IN_KEY * self.world.model.page_size:
            self.world.append(cursor, self.some(choices))
        held = self.world.acquire_cursor(cursor)
        if self.world.extend(held):
            self.world.commit(held, len(held.ids))
        self.world.release(held)


STEPS: dict[str, Callable[[Walk], bool]] = {
    "acquire": Walk.may_lease,
    "extend": Walk.has_lease,
    "commit": Walk.has_lease,
    "release": Walk.has_lease,
    "request": Walk.may_lease,
    "look": Walk.may_lease,
    "rival": Walk.may_lease,
    "race": Walk.may_lease,
    "attach": Walk.has_lease,
    "follow": Walk.may_lease,
    "evict": Walk.always,
    "squeeze": Walk.always,
    "remove": Walk.has_pages,
    "flush": Walk.is_half_full,
    "new_cursor": Walk.may_add_a_cursor,
    "append": Walk.always,
    "truncate": Walk.always,
    "acquire_cursor": Walk.may_lease_a_cursor,
    "turn": Walk.may_lease_a_cursor,
}
"""Every step, and when it may be taken."""

WEIGHTS = {"flush": 0.2, "release": 3, "turn": 2, "squeeze": 2}


def walk(seed: int, num_worlds: int, num_steps: int = 100) -> Counter[str]:
    """Walk through worlds one after another; return how often each situation occurred."""
    random, situations = Random(seed), Counter()
    names = list(STEPS)
    weights = [WEIGHTS.get(name, 1) for name in names]
    for _ in range(num_worlds):
        said: list[str] = []
        path = Walk(Choices(random.randrange(NUMBERS)), situations, said.append)
        try:
            for name in random.choices(names, weights, k=num_steps):
                if STEPS[name](path):
                    said.append(name)
                    path.step(name, random.randrange(NUMBERS))
            path.close()
        except Exception as error:
            error.add_note("\n".join(said[-60:]))
            raise
        finally:
            radixkv.tree._WIDE = path.kept_wide
    return situations


class CacheMachine(RuleBasedStateMachine):
    """Every step, in any order; each compares all with the model and checks every invariant."""

    situations: ClassVar[Counter[str]] = Counter()

    @initialize(number=st.integers(0, NUMBERS - 1))
    def begin(self, number: int) -> None:
        self.walk = Walk(Choices(number), self.situations, note)

    def teardown(self) -> None:
        if hasattr(self, "walk"):
            self.walk.close()


def _rule(name: str, allowed: Callable[[Walk], bool]):
    def take(self, number: int) -> None:
        self.walk.step(name, number)

    take.__name__ = name
    return precondition(lambda self: allowed(self.walk))(rule(number=st.integers(0, NUMBERS - 1))(take))


for _name, _allowed in STEPS.items():
    setattr(CacheMachine, _name, _rule(_name, _allowed))
