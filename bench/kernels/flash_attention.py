"""FlashAttention-3 beside us, where it is installed: its paged KV cache, for decoding and for new tokens on a prefix.

How many splits it makes is its own choice, which is its default. It has no way to read a shared prefix once.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator

import numpy as np
import torch

from bench.kernels.cases import Inputs
from bench.kernels.contestants import Contestant

__all__ = ["available", "flash_attention_ways"]

_MODULE = "flash_attn_interface"


def available() -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(_MODULE) is not None


def flash_attention_ways(inputs: Inputs) -> Iterator[Contestant]:
    """Its one way.

    Raises:
        ImportError: it is not installed.
    """
    attend = importlib.import_module(_MODULE).flash_attn_with_kvcache
    case, shape, device = inputs.case, inputs.shape, inputs.kv.device
    tables = torch.from_numpy(np.stack([span.pages for span in inputs.spans])).to(device)
    lengths = torch.full((case.num_requests,), case.context, dtype=torch.int32, device=device)

    def act(layer: int) -> torch.Tensor:
        query = inputs.query[layer].view(case.num_requests, case.new, shape.num_heads, shape.head_dim)
        keys, values = inputs.kv[:, layer].unbind(1)
        out = attend(query, keys, values, cache_seqlens=lengths, page_table=tables, softmax_scale=inputs.scale, causal=True)
        return (out[0] if isinstance(out, tuple) else out).flatten(0, 1)

    yield Contestant("fa3", act)
