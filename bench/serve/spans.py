"""Where time went between two moments, from the calls of named functions in whatever thread they ran.

    sent ├──────────────────────────────────────────────────────────────┤ first token
           ├ open_dialog ┤                ├ step ────────────────┤
              ├ template ┤                     ├ forward ───┤
    every instant belongs to the call that began last among those that are open; to "between X and Y" where none is

So the parts add up to the whole. One request is under way at a time. A wrapped call costs half a microsecond more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """One call of a stage, in seconds of perf_counter."""

    stage: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Point:
    """A function to time: `owner.name`, whose time is the stage's."""

    stage: str
    owner: Any
    name: str


@contextmanager
def timed(points: Sequence[Point]) -> Iterator[list[Span]]:
    """Time the functions for a while; the list grows as their calls end.

    Raises:
        AttributeError: a function that is not there any more: this benchmark is to be brought up to date.
    """
    spans: list[Span] = []
    before = [(point, getattr(point.owner, point.name)) for point in points]
    for point, function in before:
        setattr(point.owner, point.name, _timed(function, point.stage, spans))
    try:
        yield spans
    finally:
        for point, function in before:
            setattr(point.owner, point.name, function)


def attribute(spans: Sequence[Span], start_s: float, end_s: float, gaps: Callable[[str, str], str]) -> dict[str, float]:
    """Seconds of each stage between two moments; they add up to `end_s - start_s`.

    Args:
        spans: calls, of any threads.
        start_s, end_s: the moments.
        gaps: names what lies between the stages before and after it ("" at either end).
    """
    inside = [one for one in spans if one.end_s > start_s and one.start_s < end_s]
    edges = sorted(
        {start_s, end_s, *(edge for one in inside for edge in (one.start_s, one.end_s) if start_s < edge < end_s)}
    )
    seconds: dict[str, float] = {}
    for left, right in pairwise(edges):
        middle = (left + right) / 2
        active = [one for one in inside if one.start_s <= middle < one.end_s]
        if active:
            stage = max(active, key=lambda one: one.start_s).stage
        else:
            past = max((one for one in inside if one.end_s <= middle), key=lambda one: one.end_s, default=None)
            coming = min((one for one in inside if one.start_s > middle), key=lambda one: one.start_s, default=None)
            stage = gaps(past.stage if past else "", coming.stage if coming else "")
        seconds[stage] = seconds.get(stage, 0.0) + right - left
    return seconds


def _timed(function: Callable[..., Any], stage: str, spans: list[Span]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        started = perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            spans.append(Span(stage, started, perf_counter()))

    return call
