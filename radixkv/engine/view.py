"""The working view: one running request's KV, contiguous, for the length of its run.

    store  [P, L, 2, S, H, D]   page 7 │ page 2 │ page 9 │ ...        scattered, shared, immutable
              │ load: once, when the request starts         ▲ save: whole pages, as they fill
              ▼                                             │
    view   [L, 2, H, C, D]      tokens 0 ................ n            one run a head, private to the request

Attention through a page table costs a gather of every page at every layer and step in plain PyTorch; one gather per
request costs a few milliseconds and every step after it reads memory in a straight line (docs/design/0004-working-view.md
has the numbers). Views are pooled: memory that was touched once is not faulted in again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from radixkv.store.device import DeviceStore

__all__ = ["ViewPool", "WorkingView"]

_GRAIN = 256  # tokens; capacities are rounded up to this, so that views can be used again


class WorkingView:
    """KV of one request in one run a head: kv [L, 2, H, C, D], capacity C tokens."""

    __slots__ = ("capacity", "kv")

    def __init__(self, kv: torch.Tensor) -> None:
        self.kv = kv
        self.capacity = kv.shape[3]

    def load(self, store: DeviceStore, pages: Sequence[int], start: int, end: int) -> None:
        """Copy tokens [start, end) from their pages; `pages` are those of the whole sequence, in order.

        Cost: one read and one write of (end - start) tokens' KV.
        """
        size = store.shape.page_size
        first, last = start // size, -(-end // size)
        for low in range(first, last, _GRAIN // min(size, _GRAIN)):  # in pieces, so that the gather stays in the cache
            high = min(low + _GRAIN // min(size, _GRAIN), last)
            index = torch.tensor(pages[low:high], dtype=torch.long)
            piece = store.kv.index_select(0, index.to(store.kv.device))  # [n, L, 2, S, H, D]
            tokens = piece.permute(1, 2, 4, 0, 3, 5).flatten(3, 4)  # [L, 2, H, n * S, D]
            skip, stop = max(start - low * size, 0), min(end - low * size, (high - low) * size)
            self.kv[:, :, :, low * size + skip : low * size + stop].copy_(tokens[:, :, :, skip:stop])

    def save(self, store: DeviceStore, pages: Sequence[int], first: int) -> None:
        """Copy whole pages of tokens, from page `first` of the sequence on, to `pages` of the store.

        Cost: one read and one write of their KV.
        """
        if not len(pages):
            return
        size = store.shape.page_size
        tokens = self.kv[:, :, :, first * size : (first + len(pages)) * size].unflatten(3, (len(pages), size))
        piece = tokens.permute(3, 0, 1, 4, 2, 5)  # [n, L, 2, S, H, D]
        if len(pages) == 1:
            store.kv[pages[0]].copy_(piece[0])
        else:
            index = torch.tensor(pages, dtype=torch.long)
            store.kv.index_copy_(0, index.to(store.kv.device), piece.contiguous())

    def append(self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the new tokens' key and value [H, n, D] of one layer at position `start`."""
        stop = start + key.shape[1]
        self.kv[layer, 0, :, start:stop] = key
        self.kv[layer, 1, :, start:stop] = value


class ViewPool:
    """Views that wait to be used again, within a budget of tokens.

    Args:
        store: gives layers, heads, dtype and device.
        max_idle_tokens: capacity kept for reuse; beyond it a returned view's memory is given back.
    """

    def __init__(self, store: DeviceStore, max_idle_tokens: int) -> None:
        self._store = store
        self._idle: list[WorkingView] = []
        self._max_idle_tokens = max_idle_tokens

    def take(self, capacity: int) -> WorkingView:
        """A view of at least `capacity` tokens: the tightest idle one, or a new one. Its content is arbitrary."""
        fitting = [view for view in self._idle if view.capacity >= capacity]
        if fitting:
            view = min(fitting, key=lambda view: view.capacity)
            self._idle.remove(view)
            return view
        shape = self._store.shape
        rounded = -(-capacity // _GRAIN) * _GRAIN
        size = (shape.num_layers, 2, shape.num_kv_heads, rounded, shape.head_dim)
        return WorkingView(torch.empty(size, dtype=shape.dtype, device=self._store.kv.device))

    def give(self, view: WorkingView) -> None:
        """Return a view that nobody uses any more."""
        self._idle.append(view)
        while sum(view.capacity for view in self._idle) > self._max_idle_tokens:
            self._idle.pop(0)
