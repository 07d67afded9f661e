"""The wide items of attention on Hopper: pages arrive by TMA, two warpgroups compute, each at its own pace.

    producer, 1 warp      K0 V0 │ K1 V1 │ K2 V2 │ ...     waits for a free stage, then one copy for each page and half head
                           ▼       ▼                      stages in shared memory: `full` when all bytes came,
    consumer 0, 64 rows   QK1 ║ PV0 │ softmax 1 │ ...     `empty` when both consumers have read it
    consumer 1, 64 rows     QK1 ║ PV0 │ softmax 1 │ ...

Formula:  as `attention.attend`, without window, cap or sinks: the same items, the same rows.
Tensors:  query, out [N, Hq, D], D contiguous, other strides free; kv [P, 2, S, H, D], one layer of the page store, a token's
          heads adjacent, strides of pages, parts and tokens multiples of 16 bytes; D 64 or 128, S 8 or more; bf16 or fp16.
Grid:     one program for each multiprocessor, or for each (KV head, item) where those are fewer: program p takes the work
          p, 2 P - 1 - p, 2 P + p, ... : items come longest first, so going to and fro evens out what each program gets.
Bytes:    keys and values of an item once for each KV head; queries and outputs once.
Numerics: as `attention.attend`: the same plan gives the same bits.
Needs:    a plan that `supports` said yes to. What an item holds beyond its last key is never used: such scores are hidden,
          such values set to 0 first, so pages need not be clean.
Source:   the pipeline of FlashAttention-3, arXiv:2407.08608. Its parts here: `_produce` is its producer, `_consume` its two
          consumers, `_turn` its overlap within one of them: the scores of a tile are computed while the previous tile's
          values are summed, and the softmax runs beside the latter. Nothing makes the consumers take turns: on their own
          one's softmax comes to run beside the other's products. New are the pages (`_copy_tile`) and the going to and fro.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from radixkv_kernels.device_plan import DevicePlan

try:
    import triton

    if not triton.__version__.startswith("3.6."):
        raise ImportError("Gluon changes with every Triton, and this is written for 3.6")  # torch 2.11's own
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # no Triton, or one without Gluon: `supports` says no
    gluon = None

__all__ = ["launch", "supports"]

_LOG2_E = 1 / math.log(2)
_ROWS = 128  # of a tile: two consumers of 64, what a warpgroup multiplies at least
_KEYS = 128  # of a tile: scores, weights and sums then take 160 registers of a thread, and 256 keys would not fit
_STAGES = 3  # tiles of keys, and of values, on their way or in use: with the queries 224 of 227 KiB of shared memory
_BOX = 64  # most tokens that one copy brings; items begin at multiples of it, or of a page
_HALF = 64  # elements of a swizzled row of 128 bytes
_CONSUMER_REGISTERS = 232  # of a thread; the kernel starts with 168 for each of three warpgroups: 2 * 232 + 40 is all of it
_PRODUCER_REGISTERS = 40  # what is left; with pages of 16 it spills two numbers, outside its loop over tiles


def supports(
    query: torch.Tensor,
    kv: torch.Tensor,
    plan: DevicePlan,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> bool:
    """Whether `launch` can run these wide items; where not, the portable kernel does."""
    shape, size = plan.geometry, kv.element_size()
    if gluon is None or window is not None or soft_cap is not None or sinks is not None:
        return False
    if query.dtype not in (torch.bfloat16, torch.float16) or shape.head_dim not in (64, 128):
        return False
    if shape.wide != _ROWS or shape.page_size < 8 or not query.is_cuda:
        return False
    aligned = all(stride * size % 16 == 0 for stride in kv.stride()[:3]) and kv.data_ptr() % 16 == 0
    return aligned and kv.stride(3) == shape.head_dim and _is_hopper(query.device)


def launch(query: torch.Tensor, kv: torch.Tensor, plan: DevicePlan, out: torch.Tensor, scale: float) -> None:
    """Run the wide items of a plan: outputs of rows with one item, partial results of the others.

    Cost: one launch; about 20 µs of the host, for the tensor map.

    Args:
        query: [N, Hq, D].
        kv: [P, 2, S, H, D], one layer.
        plan: the work; `supports` said yes to it.
        out: [N, Hq, D] to write to.
        scale: of the scores.
    """
    shape = plan.geometry
    box = min(shape.page_size, _BOX)
    work = plan.grids[1] * shape.num_kv_heads
    if not work:
        return
    _attend_kernel[(min(work, shape.num_processors),)](
        _pages_map(kv, box), query, out, plan.partial, plan.lse,
        plan.wide, plan.counts[1:], plan.rows, plan.positions, plan.pages, plan.slot_begin,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1), scale * _LOG2_E,
        NUM_HEADS=shape.num_heads, NUM_KV_HEADS=shape.num_kv_heads, GROUP=shape.group, HEAD_DIM=shape.head_dim,
        PAGE_SIZE=shape.page_size, BOX=box, BLOCK_N=_KEYS, STAGES=_STAGES,
        CONSUMER_REGISTERS=_CONSUMER_REGISTERS, PRODUCER_REGISTERS=_PRODUCER_REGISTERS, num_warps=4,
    )  # fmt: skip


def _pages_map(kv: torch.Tensor, box: int) -> Any:
    """The tensor map of a layer as [P, 2, S, H * D], copied in boxes of `box` tokens and half a swizzled row."""
    num_pages, _, page_size, num_heads, head_dim = kv.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    shape = [num_pages, 2, page_size, num_heads * head_dim]
    return TensorDescriptor(kv, shape, [*kv.stride()[:3], 1], [1, 1, box, _HALF], layout)


@cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def _jit(kernel: Any) -> Any:
    """`gluon.jit` where it is there; else the kernel stays a plain function that nobody calls."""
    return kernel if gluon is None else gluon.jit(kernel)


@_jit
def _attend_kernel(
    kv, query, out, partial, lse, items, num_items, rows, positions, pages, slot_begin,
    query_row, query_head, out_row, out_head, scale,
    NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    PAGE_SIZE: gl.constexpr, BOX: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = query.dtype.element_ty
    tiles: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    boxes: gl.constexpr = BLOCK_N // BOX * (HEAD_DIM // 64)  # of one tile
    k = gl.allocate_shared_memory(dtype, [STAGES * boxes, 1, 1, BOX, 64], kv.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES * boxes, 1, 1, BOX, 64], kv.layout)
    q = gl.allocate_shared_memory(dtype, [2, 64, HEAD_DIM], tiles)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)  # when both consumers have read it
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    num_work = gl.load(num_items) * NUM_KV_HEADS
    k_tiles = k._reinterpret(dtype, [STAGES, BLOCK_N, HEAD_DIM], tiles)
    v_tiles = v._reinterpret(dtype, [STAGES, BLOCK_N, HEAD_DIM], tiles)
    bars = (k_full, v_full, k_empty, v_empty)
    where = (query, out, partial, lse, items, rows, positions, slot_begin)
    strides = (query_row, query_head, out_row, out_head)
    gl.warp_specialize(
        [
            (_consume, (0, q, k_tiles, v_tiles, bars, num_work, where, strides, scale,
                        NUM_HEADS, NUM_KV_HEADS, GROUP, HEAD_DIM, BLOCK_N, STAGES)),
            (_consume, (1, q, k_tiles, v_tiles, bars, num_work, where, strides, scale,
                        NUM_HEADS, NUM_KV_HEADS, GROUP, HEAD_DIM, BLOCK_N, STAGES)),
            (_produce, (kv, k, v, bars, num_work, items, pages, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, BOX, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@_jit
def _page_ids(pages, base, key, last, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr, BLOCK_N: gl.constexpr):
    """The pages of a tile's boxes; beyond the item's last page, that page again."""
    ids = ()
    for b in gl.static_range(BLOCK_N // BOX):
        page = gl.load(pages + base + gl.minimum((key + b * BOX) // PAGE_SIZE, last))
        ids = ids + (page,)  # type: ignore[assignment]  # noqa: RUF005  Triton unpacks no tuple with a star
    return ids


@_jit
def _copy_tile(
    kv, part: gl.constexpr, ids, key, head, to, stage, full,
    HEAD_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Start the copies of one tile; `full` is signalled when all its bytes have come."""
    halves: gl.constexpr = HEAD_DIM // 64
    boxes: gl.constexpr = BLOCK_N // BOX
    mbarrier.expect(full, BLOCK_N * HEAD_DIM * 2)
    for b in gl.static_range(boxes):
        for half in gl.static_range(halves):
            box = to.index((stage * halves + half) * boxes + b)
            place = [ids[b], part, (key + b * BOX) % PAGE_SIZE, head * HEAD_DIM + half * 64]
            tma.async_copy_global_to_shared(kv, place, full, box)


@_jit
def _produce(
    kv, k, v, bars, num_work, items, pages,
    NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Bring the tiles of all of this program's work, one after another, as stages become free."""
    k_full, v_full, k_empty, v_empty = bars
    turn = 0  # tiles since the beginning: its stage is turn % STAGES
    work, stride = gl.program_id(0), 2 * (gl.num_programs(0) - gl.program_id(0)) - 1
    while work < num_work:
        head, item = work % NUM_KV_HEADS, items + work // NUM_KV_HEADS * 8
        base, begin, end = gl.load(item + 2), gl.load(item + 3), gl.load(item + 4)
        last = (end - 1) // PAGE_SIZE
        ids = _page_ids(pages, base, begin, last, PAGE_SIZE, BOX, BLOCK_N)
        for key in range(begin, end, BLOCK_N):
            following = _page_ids(pages, base, key + BLOCK_N, last, PAGE_SIZE, BOX, BLOCK_N)
            stage, phase = turn % STAGES, turn // STAGES & 1  # phase: how often the stage was filled, odd or even
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            _copy_tile(kv, 0, ids, key, head, k, stage, k_full.index(stage), HEAD_DIM, PAGE_SIZE, BOX, BLOCK_N)
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            _copy_tile(kv, 1, ids, key, head, v, stage, v_full.index(stage), HEAD_DIM, PAGE_SIZE, BOX, BLOCK_N)
            ids = following
            turn += 1
        work += stride
        stride = 2 * gl.num_programs(0) - stride


@_jit
def _softmax(s, best, total, limit, start, scale, MASKED: gl.constexpr):
    """One tile's step: (p, new best, new total, by what earlier sums shrink). Row r sees keys below limit[r]."""
    if MASKED:
        layout: gl.constexpr = s.type.layout
        key = start + gl.arange(0, s.shape[1], gl.SliceLayout(0, layout))
        s = gl.where(key[None, :] < limit[:, None], s, float("-inf"))
    new = gl.maximum(best, gl.max(s, 1) * scale)
    safe = gl.where(new == float("-inf"), 0.0, new) if MASKED else new  # a row that has seen no key yet
    p = gl.exp2(s * scale - safe[:, None])
    shrink = gl.exp2(best - safe)
    return p, new, total * shrink + gl.sum(p, 1), shrink


@_jit
def _turn(
    q, k, v, bars, turn, p, acc, best, total, limit, start, more, scale, MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores of tile `turn`, whose keys are there, beside the values of the one before; its softmax beside the latter only.

    Returns: the tile's weights p, rounded; acc with the previous tile's values, by the new measure; best, total.
    """
    k_full, v_full, k_empty, v_empty = bars
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, k.shape[1], 16])
    stage, before = turn % STAGES, turn - 1
    old = before % STAGES
    s = gl.full([64, k.shape[1]], 0.0, gl.float32, score)
    s = warpgroup_mma(q, k.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(old), before // STAGES & 1)
    acc = warpgroup_mma(p, v.index(old), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    weights, best, total, shrink = _softmax(s, best, total, limit, start, scale, MASKED)
    # NOTE: this wait also ends a stretch of code: the assembler would move the next one before the softmax
    mbarrier.wait(k_full.index((turn + 1) % STAGES), (turn + 1) // STAGES & 1, pred=more)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(old), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.convert_layout(weights.to(v.dtype), p.type.layout), acc, best, total


@_jit
def _consume(
    which: gl.constexpr, q_both, k, v, bars, num_work, where, strides, scale,
    NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Answer rows [64 * which, 64 * which + 64) of the tiles of all of this program's work."""
    k_full, v_full, k_empty, v_empty = bars
    query, out, partial, lse, items, rows, positions, slot_begin = where
    query_row, query_head, out_row, out_head = strides
    score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    value: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weight: gl.constexpr = gl.DotOperandLayout(0, value, 2)  # stays in registers from the scores to the second product
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])  # 16 bytes a thread
    q = q_both.index(which)
    turn = 0  # as the producer counts
    work, stride = gl.program_id(0), 2 * (gl.num_programs(0) - gl.program_id(0)) - 1
    while work < num_work:
        head, item = work % NUM_KV_HEADS, items + work // NUM_KV_HEADS * 8
        row_begin, num_rows = gl.load(item), gl.load(item + 1)
        begin, end, ordinal = gl.load(item + 3), gl.load(item + 4), gl.load(item + 5)
        m = which * 64 + gl.arange(0, 64, gl.SliceLayout(1, flat))
        row = gl.load(rows + row_begin + m // GROUP, mask=m // GROUP < num_rows, other=0).to(gl.int64)
        d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, flat))
        used = (m // GROUP < num_rows)[:, None] & (d >= 0)[None, :]
        place = (row * query_row + (head * GROUP + m % GROUP) * query_head)[:, None] + d[None, :]
        q.store(gl.load(query + place, mask=used, other=0.0))
        fence_async_shared()
        gl.thread_barrier()

        token = (which * 64 + gl.arange(0, 64, gl.SliceLayout(1, score))) // GROUP
        row_s = gl.load(rows + row_begin + token, mask=token < num_rows, other=0)
        position = gl.load(positions + row_s, mask=token < num_rows, other=-1)
        limit = gl.minimum(position + 1, end)
        earliest = gl.min(gl.where(token < num_rows, limit, end), 0)
        num_tiles = (end - begin + BLOCK_N - 1) // BLOCK_N
        clear = gl.maximum(earliest - begin, 0) // BLOCK_N  # tiles of which all rows see all

        mbarrier.wait(k_full.index(turn % STAGES), turn // STAGES & 1)
        s = gl.full([64, BLOCK_N], 0.0, gl.float32, score)
        s = warpgroup_mma(q, k.index(turn % STAGES).permute((1, 0)), s, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(turn % STAGES), count=1)
        best = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, score))
        total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, score))
        weights, best, total, _ = _softmax(s, best, total, limit, begin, scale, True)
        p = gl.convert_layout(weights.to(v.dtype), weight)
        acc = gl.full([64, HEAD_DIM], 0.0, gl.float32, value)
        turn += 1
        mbarrier.wait(k_full.index(turn % STAGES), turn // STAGES & 1, pred=num_tiles > 1)
        for tile in range(1, clear):
            start, more = begin + tile * BLOCK_N, tile + 1 < num_tiles
            p, acc, best, total = _turn(
                q, k, v, bars, turn, p, acc, best, total, limit, start, more, scale, False, STAGES,
            )  # fmt: skip
            turn += 1
        for tile in range(gl.maximum(clear, 1), num_tiles):
            start, more = begin + tile * BLOCK_N, tile + 1 < num_tiles
            p, acc, best, total = _turn(
                q, k, v, bars, turn, p, acc, best, total, limit, start, more, scale, True, STAGES,
            )  # fmt: skip
            turn += 1

        stage = (turn - 1) % STAGES
        mbarrier.wait(v_full.index(stage), (turn - 1) // STAGES & 1)
        if begin + num_tiles * BLOCK_N > end:
            _clear_beyond(v.index(stage), end - begin - (num_tiles - 1) * BLOCK_N, flat)
        acc = warpgroup_mma(p, v.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(stage), count=1)

        seen = gl.where(total == 0.0, 1.0, total)
        acc = acc / gl.convert_layout(seen, gl.SliceLayout(1, value))[:, None]
        if ordinal < 0:  # the only item of its rows
            q.store(acc.to(q.dtype))
            gl.thread_barrier()
            place = (row * out_row + (head * GROUP + m % GROUP) * out_head)[:, None] + d[None, :]
            gl.store(out + place, q.load(flat), mask=used)
            gl.thread_barrier()
        else:
            q_head = head * GROUP + (which * 64 + gl.arange(0, 64, gl.SliceLayout(1, score))) % GROUP
            slot = gl.load(slot_begin + row_s, mask=token < num_rows, other=0) + ordinal
            slot = slot.to(gl.int64) * NUM_HEADS + q_head
            _write_partial(partial, lse, slot, token, num_rows, acc, best, seen)
        work += stride
        stride = 2 * gl.num_programs(0) - stride


@_jit
def _write_partial(partial, lse, slot, token, num_rows, acc, best, total):
    """Leave a partial result for the merge: the answer so far, and the base-2 logarithm of its weights' sum."""
    value: gl.constexpr = acc.type.layout
    gl.store(lse + slot, best + gl.log2(total), mask=token < num_rows)
    slot = gl.convert_layout(slot, gl.SliceLayout(1, value))
    used = gl.convert_layout(token, gl.SliceLayout(1, value)) < num_rows
    d = gl.arange(0, acc.shape[1], gl.SliceLayout(0, value))
    gl.store(partial + slot[:, None] * acc.shape[1] + d[None, :], acc, mask=used[:, None] & (d >= 0)[None, :])


@_jit
def _clear_beyond(v, num_keys, layout: gl.constexpr):
    """Zero the values from `num_keys` on: their weights are 0, but 0 times what an unwritten page holds may be NaN.

    Both consumers do so, each for itself: they write the same.
    """
    key = gl.arange(0, v.shape[0], gl.SliceLayout(1, layout))
    x = v.load(layout)
    v.store(gl.where((key < num_keys)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()
    gl.thread_barrier()
