"""A plan on the device: one flat int32 buffer, so that it travels in one copy and stays where a CUDA graph looks for it.

│ 2 counts │ positions │ slot_begin │ rows │ narrow items │ wide items │ page ids ........ │
            fixed places, fixed lengths                                  as many as there are: only these are copied
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from radixkv_kernels.work import ITEM_FIELDS, Geometry, Plan, Span

__all__ = ["Capacity", "DevicePlan", "PlanTooLarge", "pack", "partial_results", "upload"]


_ALIGNMENT = 4  # int32 in 16 bytes


class PlanTooLarge(ValueError):
    """A plan does not fit the buffers made for it.

    Attributes:
        what: which part.
        needed, capacity: its length, and what there is.
    """

    def __init__(self, what: str, needed: int, capacity: int) -> None:
        self.what, self.needed, self.capacity = what, needed, capacity
        super().__init__(f"a plan of {needed} {what} does not fit buffers for {capacity}; upload it on its own")


@dataclass(frozen=True, slots=True)
class Capacity:
    """Lengths that a buffer is made for.

    Attributes:
        num_rows: query tokens N.
        num_row_entries: rows of all items together.
        num_narrow, num_wide: work items of each width.
        num_pages: page ids.
        num_slots: partial results.
    """

    num_rows: int
    num_row_entries: int
    num_narrow: int
    num_wide: int
    num_pages: int
    num_slots: int

    @classmethod
    def of(cls, plan: Plan) -> Capacity:
        """Just what a plan needs."""
        return cls(len(plan.positions), len(plan.rows), len(plan.narrow), len(plan.wide), len(plan.pages), plan.num_slots)

    @classmethod
    def for_rows(cls, num_rows: int, geometry: Geometry, max_pages: int) -> Capacity:
        """Enough for any ordinary batch of so many query tokens, few of which need more partial results than that."""
        spare = 8 * geometry.num_processors // geometry.num_kv_heads + 8  # items that a long context is cut into
        narrow, wide = 2 * num_rows + spare, num_rows // 2 + spare
        return cls(num_rows, 8 * num_rows + spare, narrow, wide, max_pages, 16 * num_rows + 2 * spare)

    @property
    def num_ints(self) -> int:
        """Length of the flat buffer."""
        return self.places[-1]

    @property
    def places(self) -> tuple[int, ...]:
        """Where each part begins, and where the last ends: positions, slot_begin, rows, narrow, wide, pages.

        Each begins at a multiple of 16 bytes, whatever the lengths: a kernel is compiled anew for pointers that do not.
        """
        lengths = (2, self.num_rows, self.num_rows + 1, self.num_row_entries, self.num_narrow * ITEM_FIELDS,
                   self.num_wide * ITEM_FIELDS, self.num_pages)  # fmt: skip
        return tuple(np.cumsum([-(-length // _ALIGNMENT) * _ALIGNMENT for length in lengths]).tolist())


@dataclass(slots=True)
class DevicePlan:
    """A plan's arrays on a device, as the kernels take them.

    Attributes:
        geometry, capacity: what the buffers were made for.
        spans: what was planned, for the reference.
        buffer: [num_ints] int32, all that follows.
        counts: [2] narrow and wide items that are used.
        positions, slot_begin, rows, narrow, wide, pages: as in `Plan`.
        partial: [slots, Hq, D] fp32, and lse [slots, Hq] fp32: partial results.
        grids: programs that are launched for narrow and for wide items; the kernels stop at `counts`.
        num_slots: partial results that may be used; 0 spares the merge.
    """

    geometry: Geometry
    capacity: Capacity
    spans: tuple[Span, ...]
    buffer: torch.Tensor
    counts: torch.Tensor
    positions: torch.Tensor
    slot_begin: torch.Tensor
    rows: torch.Tensor
    narrow: torch.Tensor
    wide: torch.Tensor
    pages: torch.Tensor
    partial: torch.Tensor
    lse: torch.Tensor
    grids: tuple[int, int]
    num_slots: int

    @classmethod
    def over(
        cls,
        buffer: torch.Tensor,
        capacity: Capacity,
        geometry: Geometry,
        scratch: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> DevicePlan:
        """A plan whose arrays lie in `buffer`, [capacity.num_ints] int32.

        Args:
            buffer: where; its content is a plan once `pack` wrote one, here or in a copy of it.
            capacity: of the buffer.
            geometry: of plans it will hold.
            scratch: partial and lse to use, shared with other plans of which one runs at a time; None makes them.
        """
        a, b, c, d, e, f, g = capacity.places
        if scratch is None:
            scratch = partial_results(capacity.num_slots, geometry, buffer.device)
        return cls(
            geometry, capacity, (), buffer, buffer[:a], buffer[a:b], buffer[b:c], buffer[c:d], buffer[d:e], buffer[e:f],
            buffer[f:g], scratch[0], scratch[1], (capacity.num_narrow, capacity.num_wide), capacity.num_slots,
        )  # fmt: skip

    @property
    def num_rows(self) -> int:
        """Query tokens it has room for."""
        return self.capacity.num_rows


def pack(plan: Plan, capacity: Capacity, into: npt.NDArray[np.int32]) -> int:
    """Write a plan into a flat host buffer [capacity.num_ints].

    Cost: O(plan).

    Returns:
        How many leading ints of the buffer are used, and so have to be copied to the device.

    Raises:
        PlanTooLarge: it does not fit; nothing was written.
    """
    needed = Capacity.of(plan)
    for name in Capacity.__dataclass_fields__:
        if getattr(needed, name) > getattr(capacity, name):
            raise PlanTooLarge(name.removeprefix("num_").replace("_", " "), getattr(needed, name), getattr(capacity, name))
    places = capacity.places
    into[0], into[1] = len(plan.narrow), len(plan.wide)
    for place, part in zip(
        places,
        (plan.positions, plan.slot_begin, plan.rows, plan.narrow.ravel(), plan.wide.ravel(), plan.pages),
        strict=False,
    ):
        into[place : place + len(part)] = part
    into[places[1] + len(plan.slot_begin) : places[2]] = plan.num_slots  # rows beyond the plan's have no slots
    return places[5] + len(plan.pages)


def partial_results(num_slots: int, geometry: Geometry, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for partial results: [slots, Hq, D] and [slots, Hq] fp32."""
    size = (max(num_slots, 1), geometry.num_heads, geometry.head_dim)
    return torch.empty(size, device=device), torch.empty(size[:2], device=device)


def upload(plan: Plan, geometry: Geometry, device: torch.device | str) -> DevicePlan:
    """Put one plan on a device, in buffers of its own. Cost: one copy; it is not waited for."""
    capacity = Capacity.of(plan)
    host = torch.empty(capacity.num_ints, dtype=torch.int32, pin_memory=torch.device(device).type == "cuda")
    pack(plan, capacity, host.numpy())
    ready = DevicePlan.over(host.to(device, non_blocking=True), capacity, geometry)
    return replace(ready, spans=plan.spans)
