"""Writing new keys and values into their slots, and the rotary embedding on the way there.

Formula:  kv[slot[n] // S, 0, slot[n] % S] = k[n], the same with 1 for v; slot -1 writes nothing.
          write_kv: k = key. rotate_write_kv: k = rotary(key), query = rotary(query) in place, and
          rotary(x) = x * cos + turn(x) * sin, turn(x) = [-x[R/2:], x[:R/2]], over the first R dims; the others stay.
Tensors:  query  [N, Hq, D]         strided    rotated in place
          key    [N, H, D]          strided    of the new tokens
          value  [N, H, D]          strided
          cos    [N, R] sin [N, R]  strided    R even, R <= D; the dtype of query, as transformers hands them out
          kv     [P, 2, S, H, D]    strided    one layer of the page store: kv[:, layer]
          slots  [N] int64          contiguous page id * S + offset in the page, or -1
          D is contiguous everywhere; all float tensors have one dtype (fp32, fp16, bf16).
Grid:     write_kv: (ceil(N / BLOCK_T), ceil(H * D / BLOCK_R)), one program has BLOCK_T tokens and BLOCK_R of their H * D
          columns, keys and values. rotate_write_kv: (N, groups of heads), one program has some query heads of one token, or
          some KV heads with their values.
Bytes:    2 * N * H * D elements read and as many written; with the rotary embedding 2 * N * Hq * D more, and cos and sin.
Numerics: write_kv moves bits. rotate_write_kv rounds each product and the sum to the tensors' dtype, as transformers' eager
          code does, without fused multiply-adds: bitwise equal to it in every dtype. (Triton's interpreter cuts bf16 where a
          GPU rounds to nearest.)
Needs:    slots below P * S and no slot twice (else one of its writers wins). Offsets are int64: stores exceed 2^31 elements.
          Nothing is read back, allocated or synchronised on the host, so both may be captured in a CUDA graph.
Source:   rotary embedding, RoFormer, arXiv:2104.09864, in the half-split form of transformers' Llama.
"""

from __future__ import annotations

import torch

from radixkv_kernels.backend import can_launch, jit, on_device_of, tl
from radixkv_kernels.inputs import KernelInputError, check_index, check_kv_layer, check_like, power_of_two

__all__ = ["rotate_write_kv", "rotate_write_kv_ref", "write_kv", "write_kv_ref"]

_TILE = 1024  # elements a program moves at a time: 128 threads with one 16-byte access each, in a 2-byte dtype
_MANY_TOKENS = 2048  # from here on programs outnumber the device by far, and each may take several tokens


def write_kv(key: torch.Tensor, value: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
    """Write the new tokens' keys and values of one layer into their slots.

    Cost:    one launch, 4 * N * H * D elements moved.
    Mutates: the slots of `kv` named, nothing else.
    Args:    key, value: [N, H, D]; kv: [P, 2, S, H, D]; slots: [N] int64, -1 writes nothing.
    Raises:  KernelInputError: a shape, stride, dtype or device that does not fit.
    """
    _check_write("write_kv", key, value, kv, slots)
    if not can_launch(kv):
        write_kv_ref(key, value, kv, slots)
        return
    num_tokens, num_heads, head_dim = key.shape
    if not num_tokens:
        return
    block_r = min(power_of_two(num_heads * head_dim), _TILE)
    block_t = 4 if num_tokens >= _MANY_TOKENS else 1
    grid = (-(-num_tokens // block_t), -(-num_heads * head_dim // block_r))
    with on_device_of(kv):
        _write_kv_kernel[grid](
            *(key, value, kv, slots, num_tokens),
            *(*key.stride()[:2], *value.stride()[:2], *kv.stride()[:4]),
            ROW=num_heads * head_dim,
            HEAD_DIM=head_dim,
            PAGE_SIZE=kv.shape[2],
            BLOCK_T=block_t,
            BLOCK_R=block_r,
        )


def write_kv_ref(key: torch.Tensor, value: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
    """The same in plain PyTorch."""
    rows = (slots >= 0).nonzero()[:, 0]
    pages, offsets = slots[rows] // kv.shape[2], slots[rows] % kv.shape[2]
    kv[pages, 0, offsets] = key[rows]
    kv[pages, 1, offsets] = value[rows]


def rotate_write_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Rotate queries in place; rotate keys on their way into their slots, and write them and the values.

    Cost:    one launch, (2 * Hq + 4 * H) * N * D elements moved.
    Mutates: `query`, and the slots of `kv` named. `key` stays as it was. Queries of rows with slot -1 are rotated too.
    Args:    query: [N, Hq, D]; key, value: [N, H, D]; cos, sin: [N, R]; kv: [P, 2, S, H, D]; slots: [N] int64.
    Raises:  KernelInputError: a shape, stride, dtype or device that does not fit.
    """
    _check_write("rotate_write_kv", key, value, kv, slots)
    _check_rotary(query, key, cos, sin)
    if not can_launch(kv):
        rotate_write_kv_ref(query, key, value, cos, sin, kv, slots)
        return
    num_tokens, num_heads, head_dim = query.shape
    if not num_tokens:
        return
    num_kv_heads, block_d = key.shape[1], power_of_two(head_dim)
    block_h = min(max(_TILE // block_d, 1), power_of_two(max(num_heads, num_kv_heads)))
    query_groups = -(-num_heads // block_h)
    with on_device_of(kv):
        _rotate_write_kernel[num_tokens, query_groups - (-num_kv_heads // block_h)](
            *(query, key, value, cos, sin, kv, slots, query_groups),
            *(*query.stride()[:2], *key.stride()[:2], *value.stride()[:2], cos.stride(0), sin.stride(0), *kv.stride()[:4]),
            HEADS=num_heads,
            KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            HALF=cos.shape[1] // 2,
            PAGE_SIZE=kv.shape[2],
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            BLOCK_HALF=power_of_two(cos.shape[1] // 2),
            enable_fp_fusion=False,  # a fused multiply-add rounds once where the definition rounds twice
        )


def rotate_write_kv_ref(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """The same in plain PyTorch, written as transformers writes it."""
    query.copy_(_rotated(query, cos, sin))
    write_kv_ref(_rotated(key, cos, sin), value, kv, slots)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turning, still = x.split([cos.shape[1], x.shape[2] - cos.shape[1]], dim=2)
    low, high = turning.chunk(2, dim=2)
    turned = turning * cos[:, None] + torch.cat((-high, low), dim=2) * sin[:, None]
    return torch.cat((turned, still), dim=2)


def _check_write(kernel: str, key: torch.Tensor, value: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
    check_kv_layer(kernel, kv)
    if key.dim() != 3:
        raise KernelInputError(kernel, "key", "shape [N, H, D]", list(key.shape))
    shape = (key.shape[0], kv.shape[3], kv.shape[4])
    check_like(kernel, "key", key, shape, kv)
    check_like(kernel, "value", value, shape, kv)
    check_index(kernel, "slots", slots, shape[0], kv)


def _check_rotary(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    num_tokens, _, head_dim = key.shape
    if query.dim() != 3:
        raise KernelInputError("rotate_write_kv", "query", "shape [N, Hq, D]", list(query.shape))
    check_like("rotate_write_kv", "query", query, (num_tokens, query.shape[1], head_dim), key)
    if cos.dim() != 2 or cos.shape[1] % 2 or not 0 < cos.shape[1] <= head_dim:
        raise KernelInputError("rotate_write_kv", "cos", f"shape [N, R], R even and at most {head_dim}", list(cos.shape))
    check_like("rotate_write_kv", "cos", cos, (num_tokens, cos.shape[1]), key)
    check_like("rotate_write_kv", "sin", sin, (num_tokens, cos.shape[1]), key)


@jit(do_not_specialize=["num_tokens"])
def _write_kv_kernel(
    key, value, kv, slots, num_tokens, key_token, key_head, value_token, value_head, kv_page, kv_part, kv_token,
    kv_head,
    ROW: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    column = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    head, dim = (column // HEAD_DIM).to(tl.int64), column % HEAD_DIM
    real = token < num_tokens
    inside = real & (column < ROW)
    slot = tl.load(slots + token, real, other=-1)
    # reads do not wait for the slot: a row that writes nothing is read in vain
    new_key = tl.load(key + token * key_token + head * key_head + dim, inside)
    new_value = tl.load(value + token * value_token + head * value_head + dim, inside)
    target = kv + (slot // PAGE_SIZE) * kv_page + (slot % PAGE_SIZE) * kv_token + head * kv_head + dim
    written = inside & (slot >= 0)
    tl.store(target, new_key, written)
    tl.store(target + kv_part, new_value, written)


@jit
def _products(low, high, cos, sin, column, inside, HALF: tl.constexpr):
    """Both halves after rotation; each product and sum is rounded to the dtype of `low`."""
    dtype = low.dtype
    cos_low = tl.load(cos + column, inside).to(tl.float32)
    cos_high = tl.load(cos + HALF + column, inside).to(tl.float32)
    sin_low = tl.load(sin + column, inside).to(tl.float32)
    sin_high = tl.load(sin + HALF + column, inside).to(tl.float32)
    first, second = low.to(tl.float32), high.to(tl.float32)
    new_low = (first * cos_low).to(dtype).to(tl.float32) + (-second * sin_low).to(dtype).to(tl.float32)
    new_high = (second * cos_high).to(dtype).to(tl.float32) + (first * sin_high).to(dtype).to(tl.float32)
    return new_low.to(dtype), new_high.to(dtype)


@jit
def _rotate_write_kernel(
    query, key, value, cos, sin, kv, slots, query_groups, query_token, query_head, key_token, key_head, value_token,
    value_head, cos_token, sin_token, kv_page, kv_part, kv_token, kv_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    turns = column < HALF
    cos += token * cos_token
    sin += token * sin_token
    if group < query_groups:
        head = group * BLOCK_H + rows
        here = (head < HEADS) & turns
        place = query + token * query_token + head * query_head + column
        low, high = tl.load(place, here), tl.load(place + HALF, here)
        new_low, new_high = _products(low, high, cos, sin, column, turns, HALF)
        tl.store(place, new_low, here)
        tl.store(place + HALF, new_high, here)
    else:
        head = (group - query_groups) * BLOCK_H + rows
        dim = tl.arange(0, BLOCK_D)[None, :]
        real, here = (head < KV_HEADS) & (dim < HEAD_DIM), (head < KV_HEADS) & turns
        slot = tl.load(slots + token)
        source = key + token * key_token + head * key_head
        target = kv + (slot // PAGE_SIZE) * kv_page + (slot % PAGE_SIZE) * kv_token + head * kv_head
        low, high = tl.load(source + column, here), tl.load(source + HALF + column, here)
        new_value = tl.load(value + token * value_token + head * value_head + dim, real)
        new_low, new_high = _products(low, high, cos, sin, column, turns, HALF)
        if slot >= 0:
            tl.store(target + column, new_low, here)
            tl.store(target + HALF + column, new_high, here)
            tl.store(target + kv_part + dim, new_value, real)
            if 2 * HALF < HEAD_DIM:  # the dims that do not turn
                still = real & (dim >= 2 * HALF)
                tl.store(target + dim, tl.load(source + dim, still), still)
