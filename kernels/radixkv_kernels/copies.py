"""Copying the first tokens of pages to other pages: how a request takes over a match that ends inside a page.

    source page   t0 t1 t2 t3 │ t4 t5 ...     somebody's, shared, never changed
                   ▼  ▼  ▼  ▼    count = 4
    target page   t0 t1 t2 t3 │  .  .         the request's own; its next token goes here

Formula:  kv[targets[i], :, :, :counts[i]] = kv[sources[i], :, :, :counts[i]] for each i < n.
Tensors:  kv       [P, L, 2, S, H, D]  contiguous  the page store
          sources  [n] int64           contiguous  page ids
          targets  [n] int64           contiguous  page ids
          counts   [n] int64           contiguous  tokens; 0 copies nothing, more than S copies the page
Grid:     (n, 2 * L, ceil(S * H * D / BLOCK)): one program has BLOCK elements of the keys or the values of one layer of one
          page; those beyond the count leave at once. One launch for all pages.
Bytes:    sum(counts) tokens' KV over all layers, read and written once.
Numerics: bits are moved, not numbers: NaN payloads stay.
Needs:    page ids below P; no page twice in targets, and none of them in sources, but for a page copied to itself.
          Offsets are int64.
Source:   ours.
"""

from __future__ import annotations

import torch

from radixkv_kernels.backend import can_launch, jit, on_device_of, tl
from radixkv_kernels.inputs import check_index, check_store, power_of_two

__all__ = ["copy_heads", "copy_heads_ref"]

_TILE = 4096  # elements a program copies: eight 16-byte accesses a thread in a 2-byte dtype, all in flight at once


def copy_heads(kv: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor) -> None:
    """Copy the first counts[i] tokens of page sources[i] to page targets[i], in all layers.

    Cost:    one launch; sum(counts) tokens' KV read and written. Nothing is read back or synchronised on the host.
    Mutates: the first counts[i] tokens of the target pages.
    Args:    kv: [P, L, 2, S, H, D]; sources, targets, counts: [n] int64 on the device of kv.
    Raises:  KernelInputError: a shape, stride, dtype or device that does not fit.
    """
    check_store("copy_heads", "kv", kv)
    for name, index in (("sources", sources), ("targets", targets), ("counts", counts)):
        check_index("copy_heads", name, index, len(sources), kv)
    if not can_launch(kv):
        copy_heads_ref(kv, sources, targets, counts)
        return
    if not len(sources):
        return
    _, num_layers, _, page_size, num_heads, head_dim = kv.shape
    row = num_heads * head_dim
    block = min(power_of_two(page_size * row), _TILE)
    with on_device_of(kv):
        _copy_heads_kernel[len(sources), 2 * num_layers, -(-page_size * row // block)](
            *(kv, sources, targets, counts, kv.stride(0), kv.stride(2)),
            ROW=row,
            PAGE_SIZE=page_size,
            BLOCK=block,
        )


def copy_heads_ref(kv: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor) -> None:
    """The same in plain PyTorch."""
    for source, target, count in zip(sources.tolist(), targets.tolist(), counts.tolist(), strict=True):
        kv[target, :, :, :count] = kv[source, :, :, :count]


@jit
def _copy_heads_kernel(
    kv, sources, targets, counts, kv_page, kv_part,
    ROW: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0), tl.program_id(1).to(tl.int64)  # part: layer, keys or values
    element = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    end = tl.minimum(tl.load(counts + pair), PAGE_SIZE) * ROW
    if tl.program_id(2) * BLOCK < end:
        source = kv + tl.load(sources + pair) * kv_page + part * kv_part
        target = kv + tl.load(targets + pair) * kv_page + part * kv_part
        tl.store(target + element, tl.load(source + element, element < end), element < end)
