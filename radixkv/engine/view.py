"""The working view: one running request's KV, contiguous, for the length of its run.

    store  [P, L, 2, S, H, D]   page 7 │ page 2 │ page 9 │ ...        scattered, shared, immutable
              │ load: once, when the request starts         ▲ save: whole pages, as they fill
              ▼                                             │
    view   [L, 2, H, C, D]      tokens 0 ................ n            one run a head, private to the request

Attention through a page table costs a gather of every page at every layer and step in plain PyTorch; one gather per
request is cheap, and every step after it reads memory in a straight line (docs/design/0004-working-view.md has numbers).

Views are pooled. An idle view remembers which pages its content came from, and each page's generation: a request whose
prefix starts with the same pages, never freed since, takes that view and loads only what follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from radixkv.store.device import DeviceStore

__all__ = ["NO_ORIGIN", "ViewPool", "WorkingView"]

NO_ORIGIN: npt.NDArray[np.int64] = np.empty((0, 2), np.int64)
"""The origin of a view whose content came from no pages."""

_GRAIN = 1024  # tokens; capacities are rounded up to this with a quarter to spare, so that a longer next turn fits too


class WorkingView:
    """KV of one request in one run a head: kv [L, 2, H, C, D], capacity C tokens.

    Attributes:
        kv: the tensor.
        capacity: C.
        origin: [n, 2] int64, page id and generation of the pages whose content stands in its first n pages' worth of tokens.
    """

    __slots__ = ("capacity", "kv", "origin")

    def __init__(self, kv: torch.Tensor) -> None:
        self.kv = kv
        self.capacity = kv.shape[3]
        self.origin = NO_ORIGIN

    def load(self, store: DeviceStore, pages: Sequence[int], start: int, end: int) -> None:
        """Copy tokens [start, end) from their pages; `pages` are those of the whole sequence, in order.

        Cost: one read and one write of (end - start) tokens' KV.
        """
        size = store.shape.page_size
        first, last = -(-start // size), end // size  # whole pages; at most one at each end is cut
        if start % size:
            self._load_cut(store, pages[start // size], start, min(end, first * size))
        if last > first:
            target = self._as_pages(first, last - first, size)
            if store.kv.device.type == "cpu":  # page by page: one strided copy each, nothing in between
                for piece, page in zip(target, pages[first:last], strict=True):
                    piece.copy_(store.kv[page])
            else:
                target.copy_(store.kv.index_select(0, _index(pages[first:last], store)))
        if end % size and end // size >= first:
            self._load_cut(store, pages[end // size], last * size, end)

    def save(self, store: DeviceStore, pages: Sequence[int], first: int) -> None:
        """Copy whole pages of tokens, from page `first` of the sequence on, to `pages` of the store.

        Cost: one read and one write of their KV.
        """
        source = self._as_pages(first, len(pages), store.shape.page_size)
        if store.kv.device.type == "cpu":
            for piece, page in zip(source, pages, strict=True):
                store.kv[page].copy_(piece)
        else:
            store.kv.index_copy_(0, _index(pages, store), source.contiguous())

    def _as_pages(self, first: int, count: int, size: int) -> torch.Tensor:
        """[n, L, 2, S, H, D]: the tokens of `count` pages from `first` on, seen as pages; no copy."""
        tokens = self.kv[:, :, :, first * size : (first + count) * size]
        return tokens.unflatten(3, (count, size)).permute(3, 0, 1, 4, 2, 5)

    def _load_cut(self, store: DeviceStore, page: int, start: int, end: int) -> None:
        """Copy tokens [start, end), which lie in one page."""
        size = store.shape.page_size
        head = start - start % size
        self.kv[:, :, :, start:end].copy_(store.kv[page, :, :, start - head : end - head].transpose(2, 3))

    def append(self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the new tokens' key and value [H, n, D] of one layer at position `start`."""
        stop = start + key.shape[1]
        self.kv[layer, 0, :, start:stop] = key
        self.kv[layer, 1, :, start:stop] = value


class ViewPool:
    """Views that wait to be used again, within a budget of tokens; the longest unused goes first.

    Args:
        store: gives layers, heads, dtype and device.
        max_idle_tokens: capacity kept for reuse; beyond it a returned view's memory is given back.
    """

    def __init__(self, store: DeviceStore, max_idle_tokens: int) -> None:
        self._store = store
        self._idle: list[WorkingView] = []
        self._max_idle_tokens = max_idle_tokens

    def take(self, capacity: int, origin: npt.NDArray[np.int64] = NO_ORIGIN) -> tuple[WorkingView, int]:
        """A view of at least `capacity` tokens, and how many leading pages of `origin` it holds already.

        Prefers the idle view that holds most of them, then the tightest; makes a new one where none fits. What lies beyond
        those pages is arbitrary. Cost: O(idle views + pages).
        """
        best, most = None, 0
        for view in self._idle:
            if view.capacity < capacity:
                continue
            held = _common_rows(view.origin, origin)
            if best is None or held > most or (held == most and view.capacity < best.capacity):
                best, most = view, held
        if best is None:
            return self._make(capacity), 0
        self._idle.remove(best)
        return best, most

    def give(self, view: WorkingView, origin: npt.NDArray[np.int64] = NO_ORIGIN) -> None:
        """Return a view that nobody uses any more; `origin` says which pages its beginning equals."""
        view.origin = origin
        self._idle.append(view)
        while sum(view.capacity for view in self._idle) > self._max_idle_tokens:
            self._idle.pop(0)

    def clear(self) -> None:
        """Give back the memory of idle views."""
        self._idle.clear()

    def _make(self, capacity: int) -> WorkingView:
        shape = self._store.shape
        rounded = -(-capacity * 5 // 4 // _GRAIN) * _GRAIN
        size = (shape.num_layers, 2, shape.num_kv_heads, rounded, shape.head_dim)
        return WorkingView(torch.empty(size, dtype=shape.dtype, device=self._store.kv.device))


def _index(pages: Sequence[int], store: DeviceStore) -> torch.Tensor:
    return torch.tensor(pages, dtype=torch.long).to(store.kv.device)


def _common_rows(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> int:
    """How many leading rows of two [n, 2] arrays are equal."""
    count = min(len(left), len(right))
    differ = (left[:count] != right[:count]).any(axis=1)
    return int(differ.argmax()) if differ.any() else count
