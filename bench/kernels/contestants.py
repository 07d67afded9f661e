"""Ways to compute a case's attention: ours with and without grouping, and plain PyTorch over contiguous keys and values."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from bench.kernels.cases import Inputs
from radixkv_kernels.attention import attend
from radixkv_kernels.device_plan import upload
from radixkv_kernels.planning import plan

__all__ = ["Contestant", "ours", "plain_torch"]

_SDPA_BYTES = 4e9  # copies of keys and values for it; a larger case goes without


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way. `act(layer)` enqueues the attention of that layer and returns [N, Hq, D]; all else was done before."""

    name: str
    act: Callable[[int], torch.Tensor]
    plan_ms: float | None = None


def ours(inputs: Inputs, *, share: bool, **settings: Any) -> Contestant:
    """The kernels of this project, planned and uploaded once as for all layers of a step.

    Args:
        inputs: of the case.
        share: read common prefixes once.
        settings: more for `attend`, such as tiles.
    """
    device = inputs.kv.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    geometry = inputs.geometry(processors)
    samples = []
    for _ in range(3):
        start = time.perf_counter()
        work = plan(inputs.spans, geometry, share=share)
        samples.append(time.perf_counter() - start)
    ready = upload(work, geometry, device)

    def act(layer: int) -> torch.Tensor:
        query, kv = inputs.query[layer], inputs.kv[:, layer]
        return attend(query, kv, ready, scale=inputs.scale, out=inputs.out, **settings)

    return Contestant("ours" if share else "plain", act, sorted(samples)[1] * 1e3)


def plain_torch(inputs: Inputs) -> Iterator[Contestant]:
    """scaled_dot_product_attention, where its causal mask fits and a contiguous copy of every request's KV has room."""
    case = inputs.case
    num_bytes = case.num_requests * case.context * inputs.shape.token_bytes * inputs.cycle
    if num_bytes > _SDPA_BYTES or case.new not in (1, case.context):
        return
    contiguous = [inputs.contiguous(layer) for layer in range(inputs.cycle)]
    shape = inputs.shape

    def act(layer: int) -> torch.Tensor:
        query = inputs.query[layer].view(case.num_requests, case.new, shape.num_heads, shape.head_dim).transpose(1, 2)
        keys, values = contiguous[layer].unbind(1)
        out = F.scaled_dot_product_attention(
            query, keys, values, scale=inputs.scale, is_causal=case.new > 1, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)  # decode: a view; prefill: flash attention's own layout, also a view

    yield Contestant("sdpa", act)
