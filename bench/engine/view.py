"""What paging costs a CPU in plain PyTorch, and what a working view saves. `python -m bench.engine.view`.

Attention of one decode step over all layers, SmolLM2's shape: through pages gathered at every layer, and over a view that
was gathered once. The ceiling is one read of the KV at the speed of a large copy.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from bench.common import median_time, save, table
from radixkv.engine.cpu import decode_attention
from radixkv.engine.view import WorkingView
from radixkv.store.device import DeviceStore, PageShape

LAYERS, KV_HEADS, HEADS, DIM, PAGE = 30, 3, 9, 64, 16


def measure(num_tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """One context length."""
    shape = PageShape(LAYERS, PAGE, KV_HEADS, DIM, dtype)
    num_pages = -(-num_tokens // PAGE)
    store = DeviceStore(shape, num_pages * 2, torch.device("cpu"))
    store.kv.normal_()
    pages = torch.randperm(num_pages * 2)[:num_pages]
    view = WorkingView(torch.empty(LAYERS, 2, KV_HEADS, num_pages * PAGE, DIM, dtype=dtype))
    query = torch.randn(HEADS, 1, DIM).to(dtype)
    scale = DIM**-0.5

    def through_pages() -> list[torch.Tensor]:
        outs = []
        for layer in range(LAYERS):
            kv = store.kv[:, layer].index_select(0, pages)  # [n, 2, S, H, D]
            keys, values = (kv[:, side].permute(2, 0, 1, 3).flatten(1, 2)[:, :num_tokens] for side in (0, 1))
            outs.append(decode_attention(query, keys, values, scale))
        return outs

    def over_the_view() -> list[torch.Tensor]:
        return [decode_attention(query, *view.kv[layer, :, :, :num_tokens], scale) for layer in range(LAYERS)]

    ids = pages.tolist()
    view.load(store, ids, 0, num_tokens)
    for one, other in zip(through_pages(), over_the_view(), strict=True):
        assert torch.equal(one, other)
    return {
        "tokens": num_tokens,
        "through_pages_ms": median_time(through_pages, 15) * 1e3,
        "view_ms": median_time(over_the_view, 30) * 1e3,
        "load_once_ms": median_time(lambda: view.load(store, ids, 0, num_tokens), 15) * 1e3,
        "save_ms": median_time(lambda: view.save(store, ids, 0), 15) * 1e3,
        "ceiling_ms": num_tokens * shape.token_bytes / copy_rate() * 1e3,
    }


def copy_rate() -> float:
    """Bytes a second read by a large copy."""
    source = torch.ones(64 << 20, dtype=torch.float32)
    target = torch.empty_like(source)
    target.copy_(source)
    start = time.perf_counter()
    for _ in range(3):
        target.copy_(source)
    return 3 * 2 * source.nbytes / (time.perf_counter() - start)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [measure(num_tokens, getattr(torch, arguments.dtype)) for num_tokens in (1300, 6000)]
    print(table(rows, list(rows[0])))
    save("engine_view", [{"dtype": arguments.dtype, **row} for row in rows], seed=0)


if __name__ == "__main__":
    main()
