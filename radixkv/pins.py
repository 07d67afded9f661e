"""Pins: prefixes that never leave, because somebody asked for it and has the budget.

    owner "ops"   pin 1  ── A ── B          A is shared: it counts once in the total, once for each owner
    owner "app"   pin 2  ── A ── C          total A + B + C, "ops" A + B, "app" A + C

A pin locks the node where its prefix ends, as a lease does, and holds nothing else. All pins together may hold at most
half of the cache, so that requests always find pages to evict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, final

from radixkv.cover import PathEnd, cover, num_covered
from radixkv.errors import ConfigError, PinBudgetExceeded, PinError, PinReleased
from radixkv.node import Node

if TYPE_CHECKING:
    from radixkv.leasing import Leasing

__all__ = ["Pin", "PinCost", "Pins", "Refusal"]

Refusal = Literal["off", "not_cached", "budget", "owner_budget"]
"""Why a pin is not possible."""


class Pin:
    """A prefix that stays until it is released.

    Made by `PrefixCache.pin`; a context manager that releases itself.

    Attributes:
        id: unique in its cache.
        owner: the name given to `pin`.
        namespace: the key of its namespace.
        num_pages: pages from the root that it holds.
        num_tokens: tokens in them.
    """

    __slots__ = ("_leasing", "_node", "_released", "id", "namespace", "num_pages", "num_tokens", "owner")

    def __init__(self, leasing: Leasing, pin_id: int, owner: str, node: Node) -> None:
        self._leasing = leasing
        self._node = node  # holds this pin's one lock; the pinned prefix is the path to its end
        self._released = False
        self.id = pin_id
        self.owner = owner
        self.namespace = node.namespace
        self.num_pages = node.end
        self.num_tokens = node.end * leasing.page_size

    @property
    def released(self) -> bool:
        """Whether the pin has ended."""
        return self._released

    def release(self) -> None:
        """Let the prefix be evicted in its turn again.

        Raises:
            PinReleased: it had ended before.
        """
        with self._leasing.lock:
            self._leasing.unpin(self)

    def __enter__(self) -> Pin:
        if self._released:
            raise PinReleased(self.id)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._released:
            self.release()

    def __repr__(self) -> str:
        state = "released" if self._released else f"{self.num_pages} pages"
        return f"Pin(id={self.id}, owner={self.owner!r}, {self.num_tokens} tokens, {state})"


@dataclass(frozen=True, slots=True)
class PinCost:
    """What a pin would take, and whether it may.

    Attributes:
        owner: whose it would be.
        num_tokens: tokens asked for.
        cached_tokens: those of them that are cached now, in whole pages: what it would hold.
        added_pages: pages that no pin holds yet.
        pinned_pages: pages of it that some pin holds already.
        owner_added_pages: pages that no pin of the owner holds yet.
        left_before, left_after: pages of the whole budget, without it and with it; negative where it does not fit.
        owner_left_before, owner_left_after: the same of the owner's budget; None where owners have none.
        evictable_after: pages that requests could still evict.
        refusal: why it is not possible; None where it is.
    """

    owner: str
    num_tokens: int
    cached_tokens: int
    added_pages: int
    pinned_pages: int
    owner_added_pages: int
    left_before: int
    left_after: int
    owner_left_before: int | None
    owner_left_after: int | None
    evictable_after: int
    refusal: Refusal | None

    @property
    def allowed(self) -> bool:
        """Whether `pin` would do it."""
        return self.refusal is None


@final
class Pins:
    """The live pins of a cache, and their budgets.

    Args:
        budget_pages: pages that all pins may hold; 0: there are no pins.
        owner_budget_pages: pages that the pins of one owner may hold; None: no limit but the other.
        num_pages: pages of the cache.

    Attributes:
        num_pages: pages that some pin holds.

    Raises:
        ConfigError: a budget below 0, above half of the cache, or above the whole budget.
    """

    __slots__ = ("_budget", "_live", "_next", "_owner_budget", "num_pages")

    def __init__(self, budget_pages: int, owner_budget_pages: int | None, num_pages: int) -> None:
        if not 0 <= budget_pages <= num_pages // 2:
            raise ConfigError("pin_budget_pages", budget_pages, f"0 to {num_pages // 2}, half of the cache's pages")
        if owner_budget_pages is not None and not 0 <= owner_budget_pages <= budget_pages:
            expected = f"0 to pin_budget_pages={budget_pages}, or None for no limit of its own"
            raise ConfigError("pin_budget_per_owner", owner_budget_pages, expected)
        self._budget = budget_pages
        self._owner_budget = owner_budget_pages
        self._live: dict[int, Pin] = {}
        self._next = 1
        self.num_pages = 0

    def all(self) -> tuple[Pin, ...]:
        """Every live pin, oldest first."""
        return tuple(self._live.values())

    def ends(self, owner: str | None = None) -> Iterator[PathEnd]:
        """Where the pinned prefixes end, all or an owner's."""
        for pin in self._live.values():
            if owner is None or pin.owner == owner:
                yield PathEnd(pin._node, pin.num_pages)

    def cost(self, owner: str, end: PathEnd, num_tokens: int, page_size: int, evictable_after: int) -> PinCost:
        """What pinning the path to `end` would take. Cost: O(nodes of all pinned paths)."""
        added = _added(self.ends(), end)
        owned = list(self.ends(owner))
        owner_added = _added(iter(owned), end)
        left = self._budget - self.num_pages
        owner_left = None if self._owner_budget is None else self._owner_budget - num_covered(cover(owned))
        owner_after = None if owner_left is None else owner_left - owner_added
        refusal: Refusal | None = None
        if self._budget == 0:
            refusal = "off"
        elif end.position == 0:
            refusal = "not_cached"
        elif added > left:
            refusal = "budget"
        elif owner_after is not None and owner_after < 0:
            refusal = "owner_budget"
        return PinCost(
            owner=owner,
            num_tokens=num_tokens,
            cached_tokens=end.position * page_size,
            added_pages=added,
            pinned_pages=end.position - added,
            owner_added_pages=owner_added,
            left_before=left,
            left_after=left - added,
            owner_left_before=owner_left,
            owner_left_after=owner_after,
            evictable_after=evictable_after,
            refusal=refusal,
        )

    def require(self, cost: PinCost) -> None:
        """Raise where a pin is not possible.

        Raises:
            PinError: pins are off, or nothing is cached. PinBudgetExceeded: it does not fit in a budget.
        """
        if cost.refusal in ("off", "not_cached"):
            raise PinError(cost.refusal, cost.num_tokens)
        if cost.refusal == "budget":
            raise PinBudgetExceeded(cost.added_pages, cost.left_before, cost.owner, self._budget)
        if cost.refusal == "owner_budget":
            assert cost.owner_left_before is not None and self._owner_budget is not None
            raise PinBudgetExceeded(cost.owner_added_pages, cost.owner_left_before, cost.owner, self._owner_budget)

    def add(self, leasing: Leasing, owner: str, node: Node) -> Pin:
        """A new pin of the path to the end of `node`, which the caller has locked."""
        pin = Pin(leasing, self._next, owner, node)
        self._next += 1
        self._live[pin.id] = pin
        self.num_pages = self.count()
        return pin

    def drop(self, pin: Pin) -> None:
        """Forget a pin; the caller unlocks its node.

        Raises:
            PinReleased: it had ended before.
        """
        if pin._released:
            raise PinReleased(pin.id)
        pin._released = True
        del self._live[pin.id]
        self.num_pages = self.count()

    def count(self) -> int:
        """Pages that some pin holds, counted again. Cost: O(nodes of all pinned paths)."""
        return num_covered(cover(self.ends()))


def _added(ends: Iterator[PathEnd], end: PathEnd) -> int:
    """Pages of the path to `end` that the paths to `ends` do not cover. Cost: O(nodes)."""
    covered = cover(ends)
    node: Node | None = end.node
    position = end.position
    added = 0
    while node is not None:
        added += max(position - max(covered.get(node, 0), node.start), 0)
        position = node.start
        node = node.parent
    return added
