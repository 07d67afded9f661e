"""What a plan is made of and made for: the shape of attention, the requests' new tokens, the work items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ITEM_FIELDS", "CannotPlan", "Geometry", "Ints", "Longs", "Plan", "Span"]

ITEM_FIELDS = 8
"""int32 fields of a work item: first row in `rows`, number of rows, page base, first key, end of keys, ordinal, 0, 0.

The ordinal says in which of its rows' slots the partial result goes; -1 where the item alone answers them.
"""

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


class CannotPlan(ValueError):
    """A plan was asked for what has none.

    Attributes:
        what: the setting or the span.
    """

    def __init__(self, what: str, given: object, wanted: str) -> None:
        self.what = what
        super().__init__(f"{what} is {given}; it must be {wanted}")


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of attention, and how wide the device is.

    Attributes:
        num_heads, num_kv_heads, head_dim, page_size: Hq, H, D, S.
        narrow, wide: rows times heads of a group that one tile of each width takes.
        num_processors: multiprocessors of the device.
        narrow_places, wide_places: tiles of each width that one multiprocessor runs at a time.
        least_saving: tokens for each of those who share a run, from which on it is read once for them. A shorter one is
            found in the L2 cache by whoever comes second: on an H100, 64 requests sharing 512 tokens lost 9 % by grouping.

    Raises:
        CannotPlan: query heads that KV heads cannot share evenly or that do not fit a tile, or a page of odd size.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    narrow: int = 16
    wide: int = 128
    num_processors: int = 132
    narrow_places: int = 2
    wide_places: int = 1
    least_saving: int = 768

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            raise CannotPlan("num_heads", self.num_heads, f"a multiple of num_kv_heads={self.num_kv_heads}, both above 0")
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise CannotPlan("page_size", self.page_size, "a power of two")
        if self.group > self.wide:
            raise CannotPlan("num_heads / num_kv_heads", self.group, f"at most {self.wide}, the rows of a wide tile")

    @property
    def group(self) -> int:
        """Query heads that share a KV head: G."""
        return self.num_heads // self.num_kv_heads

    @property
    def narrow_rows(self) -> int:
        """Query tokens that a narrow tile takes; 0 where not even one token's heads fit."""
        return self.narrow // self.group

    @property
    def wide_rows(self) -> int:
        """Query tokens that a wide tile takes."""
        return self.wide // self.group


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one request: they attend to all tokens before them, and to each other causally.

    Attributes:
        pages: ids of the pages that hold its tokens [0, position + num_tokens), in order; may go on beyond.
        position: tokens before the new ones.
        num_tokens: new tokens, whose KV is in the pages when attention runs.
    """

    pages: Ints
    position: int
    num_tokens: int

    @property
    def end(self) -> int:
        """Tokens in all."""
        return self.position + self.num_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one attention call. R items, N query rows in the order of the spans.

    Attributes:
        spans: what was planned.
        positions: [N] of each row in its request.
        narrow, wide: [R, ITEM_FIELDS] work items of either width. The page of key k is pages[base + k // page_size].
        rows: query rows of the items, one run an item.
        pages: page ids of the items.
        slot_begin: [N + 1]; row n's partial results are slots [slot_begin[n], slot_begin[n + 1]), none where one item
            answers it.
    """

    spans: tuple[Span, ...]
    positions: Ints
    narrow: Ints
    wide: Ints
    rows: Ints
    pages: Ints
    slot_begin: Ints

    @property
    def num_slots(self) -> int:
        """Partial results of all rows."""
        return int(self.slot_begin[-1])
