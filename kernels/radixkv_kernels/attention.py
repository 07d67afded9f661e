"""Paged attention: decode, prefill on a cached prefix, mixed batches, and prefixes that several requests share.

Formula:  out[n, h] = sum_k p[k] v[k],  p = softmax over visible k of f(scale * q[n, h] . k[k]),  k visible to row n at
          position t iff t - window < k <= t;  f(x) = soft_cap * tanh(x / soft_cap), or x.  A sink adds exp(sink[h]) to the
          softmax's denominator.
Tensors:  query [N, Hq, D]; kv [P, 2, S, H, D], one layer of the page store, strided; out [N, Hq, D]; partial [slots, Hq, D]
          and lse [slots, Hq] fp32, base 2. D contiguous everywhere, all other strides free.
Grid:     (H, work items): one program has one item of a plan (planning.py) for one KV head: up to BLOCK_M rows, which are
          query tokens times the G query heads of that KV head, over a run of keys, BLOCK_N at a time, through the page ids.
          Then (N, Hq) programs merge the partial results of rows that more than one item answers.
Bytes:    the keys and values of each item once, that is once for all requests in it; queries and outputs once; for each
          partial result, D + 1 floats written and read.
Numerics: scores and sums in fp32, probabilities rounded to the dtype of the values. Partial results are merged in the order
          of their slots, so the same plan gives the same bits; another plan of the same batch differs in the last bits.
          Against float64: about 4e-3 of the output's norm in bf16, 1e-6 in fp32 (three tf32
          products for one); a large soft cap loses more to cancellation, 5e-5 at 1,000.
Needs:    a plan made for these pages; scale > 0; int64 offsets, as the pool exceeds 2^31 elements.
Source:   the online softmax and its merge, FlashAttention, arXiv:2205.14135; splitting over keys, Flash-Decoding; reading a
          shared prefix once as a matrix product, Hydragen, arXiv:2402.05099.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from radixkv_kernels import hopper
from radixkv_kernels.backend import can_launch, jit, on_device_of, tl
from radixkv_kernels.device_plan import DevicePlan
from radixkv_kernels.planning import Span

__all__ = ["TILES", "Tile", "attend", "attend_ref"]

_LOG2_E = 1 / math.log(2)
_LARGE_HEAD = 128
_FEW_ROWS = 16  # their contexts are cut into many pieces: a merge is short of loads in flight, not of programs


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel of one width runs: keys of a tile, warps of a program, tiles in flight."""

    keys: int
    num_warps: int
    num_stages: int


TILES = {
    "narrow": Tile(32, 4, 5),
    "wide": Tile(64, 8, 5),
    "narrow fp32": Tile(32, 4, 2),
    "wide fp32": Tile(32, 4, 2),
    "wide large": Tile(32, 8, 5),  # heads of more than 128: what is in flight has to fit in shared memory
    "narrow large fp32": Tile(16, 4, 2),
    "wide large fp32": Tile(16, 4, 2),
}
"""By width, size of heads and dtype; what is not listed takes the entry without its last words.

Found by `python -m bench.kernels.tune` on an H100 for heads of 128 in bf16; the others are what compiles without spilling.
"""


def attend_ref(
    query: torch.Tensor,
    kv: torch.Tensor,
    spans: Sequence[Span],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain PyTorch, one request at a time, its pages gathered: slow, and easy to believe.

    Args:
        query: [N, Hq, D]; in float64 this is the judge of the kernels.
        kv: [P, 2, S, H, D].
        spans: one for each request; their rows stand in `query` one after another.
        scale: of the scores.
        window: tokens that a token sees, itself included; None for all.
        soft_cap: bound of the scores; None for none.
        sinks: [Hq] one more score for each head, of a value that is zero; None for none.

    Returns:
        [N, Hq, D] in the dtype of `query`.
    """
    group = query.shape[1] // kv.shape[3]
    precise = torch.promote_types(query.dtype, torch.float32)
    out, row = torch.empty_like(query), 0
    for span in spans:
        rows = slice(row, row + span.num_tokens)
        pages = torch.as_tensor(span.pages[: -(-span.end // kv.shape[2])], dtype=torch.long, device=kv.device)
        keys, values = kv[pages].transpose(0, 1).flatten(1, 2)[:, : span.end].to(precise)  # [C, H, D] each
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("nhd,khd->hnk", query[rows].to(precise), keys) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        token = torch.arange(span.position, span.end, device=kv.device)[:, None]
        key = torch.arange(span.end, device=kv.device)
        hidden = (key > token) if window is None else (key > token) | (key <= token - window)
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            sink = sinks.to(precise)[:, None, None].expand(-1, span.num_tokens, 1)
            scores = torch.cat([scores, sink], -1)
        weights = scores.softmax(-1)[..., : span.end]
        out[rows] = torch.einsum("hnk,khd->nhd", weights, values).to(query.dtype)
        row += span.num_tokens
    return out


def attend(
    query: torch.Tensor,
    kv: torch.Tensor,
    plan: DevicePlan,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tiles: Mapping[str, Tile] | None = None,
) -> torch.Tensor:
    """Attend each row to its request's keys in the pages. Launches at most three kernels; never waits for the device.

    On Hopper wide items go to a kernel of their own (hopper.py) where that supports what is asked for.

    Args:
        query: [N, Hq, D], D contiguous. N may exceed the rows of the plan: such rows of `out` are left as they are.
        kv: [P, 2, S, H, D], one layer of the page store, new tokens written.
        plan: the work, on this device; made with the same window.
        scale, window, soft_cap, sinks: as `attend_ref`.
        out: [N, Hq, D] to write to; None makes one.
        tiles: how the portable kernels run; given, they run everywhere.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(query, kv, plan, scale, out, sinks)
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not can_launch(query):
        rows = sum(span.num_tokens for span in plan.spans)
        out[:rows] = attend_ref(query[:rows], kv, plan.spans, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks)
        return out
    with on_device_of(query):
        _launch(_Call(query, kv, plan, out, scale, window, soft_cap, sinks), tiles)
    return out


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one `attend`, for the portable kernels."""

    query: torch.Tensor
    kv: torch.Tensor
    plan: DevicePlan
    out: torch.Tensor
    scale: float
    window: int | None
    soft_cap: float | None
    sinks: torch.Tensor | None

    def attend(self, width: Literal["narrow", "wide"], tiles: Mapping[str, Tile]) -> None:
        """The items of one width."""
        query, plan, kv, out, shape = self.query, self.plan, self.kv, self.out, self.plan.geometry
        i, items = (0, plan.narrow) if width == "narrow" else (1, plan.wide)
        if not plan.grids[i]:
            return
        precise = query.dtype == torch.float32
        words = [width, *["large"] * (shape.head_dim > _LARGE_HEAD), *["fp32"] * precise]
        tile = next(tiles[name] for n in range(len(words), 0, -1) if (name := " ".join(words[:n])) in tiles)
        _attend_kernel[(shape.num_kv_heads, plan.grids[i])](
            query, kv, out, plan.partial, plan.lse, query if self.sinks is None else self.sinks,
            items, plan.counts[i:], plan.rows, plan.positions, plan.pages, plan.slot_begin,
            query.stride(0), query.stride(1), out.stride(0), out.stride(1), *kv.stride()[:4],
            self.scale if self.soft_cap else self.scale * _LOG2_E, self.soft_cap or 0.0,
            NUM_HEADS=shape.num_heads, GROUP=shape.group, HEAD_DIM=shape.head_dim, BLOCK_D=_power_of_two(shape.head_dim),
            PAGE_SIZE=shape.page_size, WINDOW=self.window or 0, CAPPED=self.soft_cap is not None,
            HAS_SINKS=self.sinks is not None, PRECISE=precise, WIDEN=not query.is_cuda, BLOCK_M=getattr(shape, width),
            BLOCK_N=tile.keys, STAGES=tile.num_stages, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    def merge(self) -> None:
        """The partial results of rows with several items."""
        plan, out, shape = self.plan, self.out, self.plan.geometry
        rows = min(self.query.shape[0], plan.num_rows)
        _merge_kernel[(rows, shape.num_heads)](
            plan.partial, plan.lse, plan.slot_begin, self.query if self.sinks is None else self.sinks, out,
            out.stride(0), out.stride(1), NUM_HEADS=shape.num_heads, HEAD_DIM=shape.head_dim,
            BLOCK_D=_power_of_two(shape.head_dim), HAS_SINKS=self.sinks is not None, BLOCK_S=16,
            num_warps=4 if rows <= _FEW_ROWS else 2,
        )  # fmt: skip


def _launch(call: _Call, tiles: Mapping[str, Tile] | None) -> None:
    """All kernels of a call."""
    query, plan = call.query, call.plan
    if tiles is None and hopper.supports(query, call.kv, plan, call.window, call.soft_cap, call.sinks):
        with _beside(query.device, all(plan.grids)) as join:
            hopper.launch(query, call.kv, plan, call.out, call.scale)
        call.attend("narrow", TILES)
        join()
    else:
        call.attend("narrow", tiles or TILES)
        call.attend("wide", tiles or TILES)
    if plan.num_slots:
        call.merge()


@contextmanager
def _beside(device: torch.device, wanted: bool) -> Iterator[Callable[[], None]]:
    """What is launched within runs beside what follows, in a graph that is being captured; else before it.

    Yields a function that lets what follows wait for it. Few wide tiles keep few processors busy: the narrow ones fill the
    rest. Outside graphs the events that this takes cost the host more than it gains.
    """
    if not (wanted and torch.cuda.is_current_stream_capturing()):
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(device), _side_stream(device, threading.get_ident())
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)


@cache
def _side_stream(device: torch.device, _: int) -> torch.cuda.Stream:
    """One for each thread: two may be capturing at a time."""
    return torch.cuda.Stream(device)


@jit
def _dot(a, b, acc, PRECISE: tl.constexpr, WIDEN: tl.constexpr):
    """Acc + a @ b. The interpreter multiplies no bf16: it widens first, which changes no product."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3" if PRECISE else "tf32")


@jit
def _attend_kernel(
    query, kv, out, partial, lse, sinks, items, num_items, rows, positions, pages, slot_begin,
    query_row, query_head, out_row, out_head, kv_page, kv_half, kv_token, kv_head,
    scale, soft_cap,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, HAS_SINKS: tl.constexpr,
    PRECISE: tl.constexpr, WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head, number = tl.program_id(0), tl.program_id(1)  # heads first: those that run together read the same pages
    if number >= tl.load(num_items):
        return
    item = items + number * 8
    row_begin, num_rows, base = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    begin, end, ordinal = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)

    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token, q_head = m // GROUP, head * GROUP + m % GROUP
    used = token < num_rows
    row = tl.load(rows + row_begin + token, mask=used, other=0).to(tl.int64)
    position = tl.load(positions + row, mask=used, other=-1)
    inside = d < HEAD_DIM
    q = tl.load(
        query + (row * query_row + q_head * query_head)[:, None] + d[None, :],
        mask=used[:, None] & inside[None, :],
        other=0.0,
    )
    kv += head.to(tl.int64) * kv_head

    end = tl.minimum(end, tl.max(position, 0) + 1)
    earliest = tl.min(tl.where(used, position, 2147483647), 0)
    if WINDOW > 0:
        begin += tl.maximum(earliest - WINDOW + 1 - begin, 0) // BLOCK_N * BLOCK_N  # whole tiles that nobody sees
        clear = begin  # a window hides keys in the first tiles too: look at each
    else:
        clear = begin + tl.maximum(tl.minimum(end, earliest + 1) - begin, 0) // BLOCK_N * BLOCK_N  # up to here all see all

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, clear, BLOCK_N, num_stages=STAGES):
        key = start + n
        page = tl.load(pages + base + key // PAGE_SIZE).to(tl.int64)
        place = (page * kv_page + (key % PAGE_SIZE) * kv_token)[:, None] + d[None, :]
        k = tl.load(kv + place) if HEAD_DIM == BLOCK_D else tl.load(kv + place, mask=inside[None, :], other=0.0)
        s = _dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISE, WIDEN)
        if CAPPED:
            s = soft_cap * (1 - 2 / (tl.exp(2 * s * scale / soft_cap) + 1)) * 1.4426950408889634
            new = tl.maximum(best, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
        else:
            new = tl.maximum(best, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new[:, None])
        shrink = tl.exp2(best - new)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(kv + kv_half + place) if HEAD_DIM == BLOCK_D else tl.load(
            kv + kv_half + place, mask=inside[None, :], other=0.0)  # fmt: skip
        acc = _dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISE, WIDEN)
        best = new
    for start in tl.range(clear, end, BLOCK_N, num_stages=1):
        key = start + n
        known = key < end
        page = tl.load(pages + base + key // PAGE_SIZE, mask=known, other=0).to(tl.int64)
        place = (page * kv_page + (key % PAGE_SIZE) * kv_token)[:, None] + d[None, :]
        k = tl.load(kv + place, mask=known[:, None] & inside[None, :], other=0.0)
        s = _dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISE, WIDEN)
        if CAPPED:
            s = soft_cap * (1 - 2 / (tl.exp(2 * s * scale / soft_cap) + 1)) * 1.4426950408889634
        else:
            s = s * scale
        visible = known[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            visible &= key[None, :] > position[:, None] - WINDOW
        s = tl.where(visible, s, float("-inf"))
        new = tl.maximum(best, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(best - safe)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(kv + kv_half + place, mask=known[:, None] & inside[None, :], other=0.0)
        acc = _dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISE, WIDEN)
        best = new

    mask = used[:, None] & inside[None, :]
    if ordinal < 0:  # the only item of its rows
        if HAS_SINKS:
            sink = tl.load(sinks + q_head, mask=used, other=0.0).to(tl.float32) * 1.4426950408889634
            top = tl.maximum(best, sink)
            shrink = tl.exp2(best - top)
            total = total * shrink + tl.exp2(sink - top)
            acc = acc * shrink[:, None]
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + (row * out_row + q_head * out_head)[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=mask)
    else:
        slot = (tl.load(slot_begin + row, mask=used, other=0) + ordinal).to(tl.int64) * NUM_HEADS + q_head
        seen = tl.where(total == 0.0, 1.0, total)  # where no key was seen, best is -inf, and says so
        tl.store(partial + slot[:, None] * HEAD_DIM + d[None, :], acc / seen[:, None], mask=mask)
        tl.store(lse + slot, best + tl.log2(seen), mask=used)


@jit
def _merge_kernel(
    partial, lse, slot_begin, sinks, out, out_row, out_head,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SINKS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(slot_begin + row), tl.load(slot_begin + row + 1)
    if begin == end:
        return
    d, s = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    best, total = float("-inf"), 0.0
    if HAS_SINKS:
        best, total = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634, 1.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_S):
        slot = (start + s).to(tl.int64) * NUM_HEADS + head
        known = start + s < end
        weight = tl.load(lse + slot, mask=known, other=float("-inf"))
        new = tl.maximum(best, tl.max(weight, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(weight - safe)
        shrink = tl.exp2(best - safe)
        mask = known[:, None] & (d < HEAD_DIM)[None, :]
        part = tl.load(partial + slot[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        acc = acc * shrink + tl.sum(part * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        best = new
    acc = acc / tl.where(total == 0.0, 1.0, total)
    place = out + row.to(tl.int64) * out_row + head * out_head + d
    tl.store(place, acc.to(out.dtype.element_ty), mask=d < HEAD_DIM)


def _power_of_two(value: int) -> int:
    return max(1 << (value - 1).bit_length(), 16)


def _check(
    query: torch.Tensor,
    kv: torch.Tensor,
    plan: DevicePlan,
    scale: float,
    out: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    shape = plan.geometry
    want = (shape.page_size, shape.num_kv_heads, shape.head_dim)
    if query.shape[1:] != (shape.num_heads, shape.head_dim) or kv.shape[1] != 2 or tuple(kv.shape[2:]) != want:
        raise ValueError(f"query {tuple(query.shape)} and kv {tuple(kv.shape)} do not fit a plan for {shape}")
    if query.stride(-1) != 1 or kv.stride(-1) != 1:
        raise ValueError("the last dimension of query and kv must be contiguous")
    if query.dtype != kv.dtype:
        raise ValueError(f"query is {query.dtype} and kv is {kv.dtype}: they must be the same")
    if not scale > 0:
        raise ValueError(f"scale={scale}: above 0 is needed")
    if query.shape[0] < plan.num_rows:
        raise ValueError(f"query has {query.shape[0]} rows, and the plan is for {plan.num_rows}")
    if out is not None and (out.shape != query.shape or out.dtype != query.dtype or out.stride(-1) != 1):
        raise ValueError(f"out must be as query, {tuple(query.shape)} {query.dtype}, its last dimension contiguous")
    if sinks is not None and (sinks.shape != query.shape[1:2] or not sinks.is_contiguous()):
        raise ValueError(f"sinks must be [{query.shape[1]}], contiguous")
