"""Retention: how much a request would like its pages to be kept, by ranges of its tokens.

    tokens    [0 ......... 1,024 ............ 9,000 .... ∞)      page_size 16
    ranges     priority 80 │ none               │ priority 0      [Retain(0, 1024, 80), Retain(9000, None, 0)]
    pages     [0 ....... 64) [64 ............ 563) [563 ...       a page belongs to the range of its first token

A wish under pressure, never an order: of the leaves that may be evicted, those of the lowest level go first, and inside a
level the policy decides. What no range covers has the level `DEFAULT_PRIORITY`. A range with a `ttl_s` returns to that
level once it has not been used for so long; every use of a page, with a retention or without, begins the time anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, final

from radixkv.errors import ConfigError
from radixkv.tokens import as_count

if TYPE_CHECKING:
    from radixkv.node import Node
    from radixkv.tree import RadixTree

__all__ = ["DEFAULT_PRIORITY", "Retain", "Retention", "Standing"]

DEFAULT_PRIORITY: Final = 35
"""The level of pages that nobody said anything about, as TensorRT-LLM has it."""


class Standing(NamedTuple):
    """Where a leaf stands now: its level, and when that changes next, in seconds of the cache's clock (inf: never)."""

    level: int
    due_s: float


@dataclass(frozen=True, slots=True)
class Retain:
    """A wish for the tokens [start, stop) of a request.

    Attributes:
        start: the first token.
        stop: the token after the last; None: open, generated tokens included.
        priority: 0 (evicted first) to 100 (last); 35 is what everything else has.
        ttl_s: seconds after the last use until it is over; None: never.
        decay: "step" falls to 35 at once when the time is over, "linear" one level after another until then.

    Raises:
        ConfigError: a value outside these.
    """

    start: int
    stop: int | None
    priority: int
    ttl_s: float | None = None
    decay: Literal["step", "linear"] = "step"

    def __post_init__(self) -> None:
        for name in ("start", "priority") if self.stop is None else ("start", "stop", "priority"):
            object.__setattr__(self, name, as_count(name, getattr(self, name)))
        if self.start < 0:
            raise ConfigError("start", self.start, "a token's index, at least 0")
        if self.stop is not None and self.stop <= self.start:
            raise ConfigError("stop", self.stop, f"above start={self.start}, or None for an open end")
        if not 0 <= self.priority <= 100:
            raise ConfigError("priority", self.priority, "0 to 100")
        ttl_s: object = self.ttl_s
        if ttl_s is not None:
            if isinstance(ttl_s, bool) or not isinstance(ttl_s, Real) or not 0 < float(ttl_s) < inf:
                raise ConfigError("ttl_s", ttl_s, "seconds, more than 0, or None for no end")
            object.__setattr__(self, "ttl_s", float(ttl_s))
        if self.decay not in ("step", "linear"):
            raise ConfigError("decay", self.decay, "'step' or 'linear'")

    def standing(self, used_s: float, now_s: float) -> Standing:
        """The level at `now_s` of pages last used at `used_s`; its end lies after `now_s`."""
        ttl_s, distance = self.ttl_s, self.priority - DEFAULT_PRIORITY
        if ttl_s is None or distance == 0:
            return Standing(self.priority, inf)
        if now_s - used_s >= ttl_s:
            return Standing(DEFAULT_PRIORITY, inf)
        steps = abs(distance) if self.decay == "linear" else 1
        done = max(int((now_s - used_s) / ttl_s * steps), 0)
        while done < steps and used_s + (done + 1) * ttl_s / steps <= now_s:  # rounding must not stop the clock
            done += 1
        if done >= steps:
            return Standing(DEFAULT_PRIORITY, inf)
        fallen = done if distance > 0 else -done
        return Standing(self.priority - fallen, used_s + (done + 1) * ttl_s / steps)

    def stronger(self, other: Retain | None) -> bool:
        """Whether it keeps a page that has just been used better than `other` does, or than no wish at all."""
        if other is None or self.priority != other.priority:
            return self.priority > (DEFAULT_PRIORITY if other is None else other.priority)
        longer, shorter = (self, other) if self.priority > DEFAULT_PRIORITY else (other, self)
        return longer._lasts() > shorter._lasts()

    def _lasts(self) -> float:
        """How long it holds its level, in seconds, for comparing two of one priority."""
        if self.ttl_s is None:
            return inf
        return self.ttl_s if self.decay == "step" else self.ttl_s / 2


@final
class Retention:
    """The ranges of one request, checked and in order.

    Args:
        ranges: disjoint ranges, in any order.

    Raises:
        ConfigError: they overlap, or are no `Retain`.
    """

    __slots__ = ("ranges",)

    def __init__(self, ranges: Iterable[Retain]) -> None:
        given = list(ranges)
        for one in given:
            if not isinstance(one, Retain):
                raise ConfigError("retention", one, "Retain(start, stop, priority)")
        given.sort(key=_start)
        for index in range(1, len(given)):
            stop = given[index - 1].stop
            if stop is None or stop > given[index].start:
                raise ConfigError("retention", given[index - 1], f"to stop where the next one starts, {given[index].start}")
        self.ranges = tuple(given)

    def apply(self, tree: RadixTree, node: Node, num_others: int) -> None:
        """Mark the path that ends with `node`, which is locked. It is split where the mark changes, nowhere else.

        On the first `num_others` pages, which others have published, and on those that carry a wish already, the stronger of
        the two holds, where no wish counts as the default. Its own new pages get what it says.

        Cost: O(nodes of the path), and O(edge) for a split.
        """
        size = tree.page_size
        below = node
        for wish in reversed(self.ranges):
            first = -(-wish.start // size)
            last = node.end if wish.stop is None else min(-(-wish.stop // size), node.end)
            while first < last:
                while below.start >= last:
                    assert below.parent is not None, below
                    below = below.parent
                low = max(first, below.start)
                if low < num_others < last:
                    low = num_others
                if _holds(wish, below.retain, low >= num_others):
                    below = _cut_out(tree, below, low, last)
                    below.retain = wish if wish.priority != DEFAULT_PRIORITY else None
                last = low


def _start(wish: Retain) -> int:
    return wish.start


def _holds(wish: Retain, kept: Retain | None, own: bool) -> bool:
    """Whether `wish` replaces what is kept: nobody's but its own where `own`."""
    if kept is None and own:
        return wish.priority != DEFAULT_PRIORITY
    return wish.stronger(kept)


def _cut_out(tree: RadixTree, node: Node, first: int, last: int) -> Node:
    """The node that covers pages [first, last) of `node` and no others."""
    node = tree.end_at(node, last)
    if first > node.start:
        tree.end_at(node, first)
    return node
