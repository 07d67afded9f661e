"""Make a transformers decoder fast on a CPU, without touching its code.

    prepare_for_cpu(model)          every nn.Linear, norm and gated MLP it recognises is replaced in place
        q_proj k_proj v_proj   ->   one product; three modules still answer, each with its own rows
        gate_proj up_proj      ->   one product, then act(gate) * up
        other nn.Linear        ->   weight packed once into oneDNN's layout
        *RMSNorm               ->   torch's own normalisation, fewer operators (in plain fp32 this alone is done)
    decode_attention(), prefill_attention()     attention over one request's contiguous KV view

A norm or MLP is replaced only if that gives its own answer on random input; what is not recognised is left alone.
Prepared models are for inference only. Letters: N new tokens, C context tokens (cached and new), Hq query heads,
H KV heads, D head dim.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["best_cpu_dtype", "causal_bias", "decode_attention", "prefill_attention", "prepare_for_cpu"]

_PACK_ROWS_HINT = 64  # oneDNN lays the weight out for this many rows; the layout for 1 row is a third slower
_INT8_MAX_ROWS = 4  # beyond this the packed bf16 product is faster than the int8 one
_FEW_ROWS = 16  # up to here a call costs more than its arithmetic
_SPLIT_MIN_TOKENS = 256  # from here on, cached and new tokens are attended apart and merged


def best_cpu_dtype() -> torch.dtype:
    """bf16 where this CPU multiplies bf16 in hardware (AMX or AVX512-BF16), fp32 elsewhere."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = any(getattr(torch.cpu, name, bool)() for name in probes)
    return torch.bfloat16 if fast else torch.float32


def prepare_for_cpu(model: nn.Module, *, weights: Literal["native", "int8"] = "native") -> list[str]:
    """Replace what is slow on a CPU inside `model`, in place.

    Cost: one pass over the weights (about 1 s per GB); each layer's old weights are freed as it goes.
    Mutates: `model`. Tied input embeddings stay as they are; the output head gets its own packed copy.

    Args:
        model: an eval-mode transformers decoder on the CPU, bf16 or fp32.
        weights: "native" keeps the dtype's rounding; "int8" adds one int8 copy per linear layer (one scale a row),
            used for products of at most 4 rows, that is for decode. Faster, and no longer the model's exact answer.

    Returns:
        What was done, one plain sentence each.

    Raises:
        ValueError: unknown `weights`, or a model that is not on the CPU.
    """
    if weights not in ("native", "int8"):
        raise ValueError(f"weights={weights!r}: choose 'native' or 'int8'")
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise ValueError("prepare_for_cpu wants every parameter on the CPU; move the model there first")
    done: Counter[str] = Counter()
    with torch.inference_mode(False), torch.no_grad():
        _prepare_children(model, weights, done)
    return [f"{count} {note}" for note, count in done.items()]


def _prepare_children(parent: nn.Module, weights: str, done: Counter[str]) -> None:
    _fuse_qkv(parent, weights, done)
    for name, child in list(parent.named_children()):
        swap = _replacement(child, weights)
        if swap is None:
            _prepare_children(child, weights, done)
        else:
            setattr(parent, name, swap.eval())
            done[swap.note] += 1


def decode_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Attend one new token of one request over its whole context.

    Cost: one read of k and v. Mutates: nothing.

    Args:
        q: [Hq, 1, D].
        k: [H, C, D], a slice of the view, the new token's row included; D contiguous, other strides free.
        v: [H, C, D].
        scale: multiplies q @ k^T.
        window: sliding window in tokens, the new one included; None for all.

    Returns:
        [1, Hq, D].
    """
    if window is not None and k.shape[1] > window:
        k, v = k[:, -window:], v[:, -window:]
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, enable_gqa=q.shape[0] != k.shape[0])
    return out[0].transpose(0, 1)


def causal_bias(num_new: int, num_context: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Additive mask [N, C] for the last N of C tokens; build it once a step and share it between layers."""
    last = torch.arange(num_context - num_new, num_context).unsqueeze(1)
    key = torch.arange(num_context)
    hidden = key > last
    if window is not None:
        hidden |= key <= last - window
    return torch.zeros(num_new, num_context, dtype=dtype).masked_fill_(hidden, -math.inf)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Attend N new tokens of one request, causally, over its context.

    The path depends on N and C only, never on strides, so equal blocks at equal positions give equal bits.
    Cost: N * C * Hq * D * 4 flops; the split path skips the mask. Mutates: nothing.

    Args:
        q: [Hq, N, D], the last N of the C tokens.
        k: [H, C, D], a slice of the view, new rows included; D contiguous.
        v: [H, C, D].
        scale: multiplies q @ k^T.
        mask: `causal_bias(N, C, q.dtype, window)` if the caller shares one between layers; else built when needed.
        window: sliding window in tokens; None for all.

    Returns:
        [N, Hq, D].

    Source: merging two softmaxes by their log-sum-exp, FlashAttention, arXiv:2205.14135.
    """
    num_new, num_context, gqa = q.shape[1], k.shape[1], q.shape[0] != k.shape[0]
    windowed = window is not None and num_context > window
    if num_new == num_context and not windowed:
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, is_causal=True, enable_gqa=gqa)
        return out[0].transpose(0, 1)
    if num_new >= _SPLIT_MIN_TOKENS and num_context >= 2 * num_new and not windowed and _can_split():
        return _split_attention(q, k, v, scale).transpose(0, 1)
    if mask is None:
        mask = causal_bias(num_new, num_context, q.dtype, window)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out[0].transpose(0, 1)


_FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


@cache
def _can_split() -> bool:
    """Whether this torch's CPU flash operator returns the log-sum-exp and takes fewer KV heads than query heads."""
    q, k = torch.eye(4).reshape(1, 4, 1, 4), torch.ones(1, 2, 3, 4)
    try:
        out, lse = _FLASH(q, k, k, 0.0, False, scale=1.0)
    except (RuntimeError, TypeError):
        return False
    return bool(torch.allclose(out, torch.ones(1)) and torch.allclose(lse.flatten(), torch.full((4,), 1 + math.log(3))))


def _split_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Cached tokens without a mask, all query heads of a KV head as one block of rows; new tokens causally; merged."""
    heads, num_new, dim = q.shape
    kv_heads, past = k.shape[0], k.shape[1] - num_new
    rows = q.reshape(1, kv_heads, heads // kv_heads * num_new, dim)
    old, old_lse = _FLASH(rows, k[None, :, :past], v[None, :, :past], 0.0, False, scale=scale)
    new, new_lse = _FLASH(q[None], k[None, :, past:], v[None, :, past:], 0.0, True, scale=scale)
    share = torch.sigmoid(old_lse.reshape(heads, num_new) - new_lse.reshape(heads, num_new)).unsqueeze(-1)
    return torch.lerp(new[0].float(), old.reshape(heads, num_new, dim).float(), share).to(q.dtype)


class _Linear(nn.Module):
    """One product for one or more linear layers on the same input; outputs lie side by side. [.., K] -> [.., sum N]."""

    note = "linear layers replaced by packed ones"
    bias: Tensor | None

    def __init__(self, parts: Sequence[nn.Linear], weights: str) -> None:
        super().__init__()
        self.widths = [p.out_features for p in parts]
        self.in_features, self.out_features = parts[0].in_features, sum(self.widths)
        weight = parts[0].weight if len(parts) == 1 else torch.cat([p.weight for p in parts])
        bias = None if parts[0].bias is None else torch.cat([p.bias for p in parts])
        self.register_buffer("bias", bias, persistent=False)
        weight, self.packed = weight.detach(), _packs(weight)
        self._int8 = _quantize_rows(weight) if weights == "int8" else None
        # NOTE: not a buffer, a packed tensor survives no state_dict.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS_HINT) if self.packed else weight

    def forward(self, x: Tensor) -> Tensor:
        if self._int8 is not None and x.numel() <= _INT8_MAX_ROWS * self.in_features:
            out = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, self.in_features), *self._int8)
            out = out.view(*x.shape[:-1], self.out_features)
            return out if self.bias is None else out + self.bias
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return F.linear(x, self._weight, self.bias)

    @property
    def weight(self) -> Tensor:
        """The dense [N, K] weight, unpacked on demand, for code that looks at it. Cost: a copy when packed."""
        return self._weight.to_dense() if self.packed else self._weight


class _FirstOfFused(nn.Module):
    """Stands for q_proj: computes q, k and v, hands back q and keeps the rest for the modules asked next."""

    def __init__(self, fused: _Linear) -> None:
        super().__init__()
        self.fused = fused
        self.kept: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        parts = self.fused(x).split(self.fused.widths, -1)
        self.kept = (x, parts)
        return parts[0]


class _RestOfFused(nn.Module):
    """Stands for k_proj or v_proj: its part of the product just made of the same input object, else computed anew."""

    def __init__(self, first: _FirstOfFused, index: int) -> None:
        super().__init__()
        self._shared, self.index = (first,), index  # a tuple, so that it is not registered as a child
        self.is_last = index == len(first.fused.widths) - 1

    def forward(self, x: Tensor) -> Tensor:
        (first,) = self._shared
        kept = first.kept  # one read: another thread may replace it, its input then is another object
        if kept is None or kept[0] is not x:
            return first.fused(x).split(first.fused.widths, -1)[self.index]
        if self.is_last:
            first.kept = None
        return kept[1][self.index]


def _fuse_qkv(parent: nn.Module, weights: str, done: Counter[str]) -> None:
    names = ("q_proj", "k_proj", "v_proj")
    parts: list[Any] = [getattr(parent, name, None) for name in names]
    if not _same_input(parts) or not _gains(parts[0].weight, weights):
        return
    first = _FirstOfFused(_Linear(parts, weights))
    parent.q_proj = first.eval()
    parent.k_proj, parent.v_proj = _RestOfFused(first, 1).eval(), _RestOfFused(first, 2).eval()
    done["attention layers compute q, k and v as one product"] += 1


def _same_input(parts: Sequence[Any]) -> bool:
    if any(type(p) is not nn.Linear for p in parts):
        return False
    return len({(p.in_features, p.weight.dtype, p.bias is None) for p in parts}) == 1


def _gains(weight: Tensor, weights: str) -> bool:
    """Whether replacing a product pays. Plain fp32 does not: as fast for few rows, fused 9 % slower for many."""
    return weights == "int8" or _packs(weight)


def _packs(weight: Tensor) -> bool:
    usable = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.bfloat16 and bool(usable)


def _quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> int8 [N, K] and one scale a row [N]; largest error half a step, 1/254 of the row's largest weight."""
    scale = (weight.abs().amax(1).float() / 127).clamp_min_(1e-12).to(weight.dtype)
    return (weight.float() / scale.float().unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8), scale


class _RmsNorm(nn.Module):
    """x / rms(x) * weight over the last dim, accumulated in fp32.

    Few rows: the layer norm of [x, -x] has mean 0 and variance mean(x * x), and torch computes it in one pass, where
    its RMS norm is ten operators on a CPU (20 against 36 us a row of 576). Many rows: torch's RMS norm.
    """

    note = "RMS norms replaced by fewer operators"
    weight: Tensor
    _twice: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("_twice", torch.cat((weight, weight)).detach(), persistent=False)
        self.eps, self.shape, self.twice_shape = eps, (weight.shape[0],), (2 * weight.shape[0],)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= _FEW_ROWS * self.shape[0]:
            both = F.layer_norm(torch.cat((x, -x), -1), self.twice_shape, self._twice, None, self.eps)
            return both[..., : self.shape[0]]
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class _GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) with gate and up as one product."""

    note = "gated MLPs compute gate and up as one product"

    def __init__(self, mlp: Any, weights: str) -> None:
        super().__init__()
        self.gate_up = _Linear([mlp.gate_proj, mlp.up_proj], weights)
        self.down_proj, self.act_fn = _Linear([mlp.down_proj], weights), mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down_proj(self.act_fn(gate) * up)


def _replacement(module: nn.Module, weights: str) -> Any:
    """What to put in `module`'s place, or None to leave it alone."""
    if type(module) is nn.Linear:
        return _Linear([module], weights) if _gains(module.weight, weights) else None
    if type(module).__name__.endswith("RMSNorm"):
        return _rms_norm(module)
    if {"gate_proj", "up_proj", "down_proj"} == {n for n, c in module.named_children() if type(c) is nn.Linear}:
        return _gated_mlp(module, weights)
    return None


def _rms_norm(module: Any) -> _RmsNorm | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or not isinstance(eps, float):
        return None
    for scale in (weight, 1 + weight):  # some families keep the weight around zero
        swap = _RmsNorm(scale, eps)
        if _agree(module, swap):
            return swap
    return None


def _gated_mlp(module: Any, weights: str) -> _GatedMlp | None:
    gate = module.gate_proj
    known = callable(getattr(module, "act_fn", None)) and _same_input([gate, module.up_proj])
    if not known or not _gains(gate.weight, weights) or not _agree(module, _GatedMlp(module, "native")):
        return None
    return _GatedMlp(module, weights)


def _agree(old: nn.Module, new: nn.Module) -> bool:
    """Whether both modules give the same answer on seeded random rows (few and many), up to the dtype's rounding."""
    weight = next(old.parameters())
    width, dtype = weight.shape[-1], weight.dtype
    for num_rows in (2, 2 * _FEW_ROWS):
        x = torch.randn(1, num_rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        try:
            want, got = old(x.clone()), new(x.clone())
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
        if not isinstance(want, Tensor) or want.shape != got.shape:
            return False
        if (want - got).abs().max() > 8 * torch.finfo(dtype).eps * want.abs().max():
            return False
    return True
