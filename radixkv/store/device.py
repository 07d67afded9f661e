"""The page store on a device: one page-major tensor.

    kv [P, L, 2, S, H, D]      P pages, L layers, keys and values, S tokens a page, H KV heads, D head dim
       └── one page: one contiguous run of bytes for all layers

A page is what is allocated, shared, evicted and moved, so it is what lies in one piece (docs/design/0002-page-major.md).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from radixkv.errors import ConfigError

__all__ = ["DeviceStore", "PageShape", "pages_that_fit"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class PageShape:
    """The shape of one page, [L, 2, S, H, D], and its dtype."""

    num_layers: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("num_layers", "page_size", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "at least 1")
        if self.dtype not in _DTYPES:
            raise ConfigError("dtype", self.dtype, "float32, float16 or bfloat16")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's KV over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.token_bytes * self.page_size


class DeviceStore:
    """The bytes of every page, on one device.

    Args:
        shape: of one page.
        num_pages: how many.
        device: CPU or CUDA. On a CPU memory is touched, and so taken, page by page as it fills.
    """

    __slots__ = ("kv", "shape")

    def __init__(self, shape: PageShape, num_pages: int, device: torch.device) -> None:
        self.shape = shape
        size = (num_pages, shape.num_layers, 2, shape.page_size, shape.num_kv_heads, shape.head_dim)
        try:
            self.kv = torch.empty(size, dtype=shape.dtype, device=device)
        except RuntimeError as error:
            raise ConfigError(
                "num_pages", num_pages, f"pages of {shape.page_bytes} bytes that fit in the memory of {device}"
            ) from error

    def here(self) -> AbstractContextManager[object]:
        """Within, its device is this thread's current one: where kernels are launched, events recorded, graphs captured."""
        return torch.cuda.device(self.kv.device) if self.kv.is_cuda else nullcontext()

    @property
    def num_pages(self) -> int:
        """Pages in the store."""
        return self.kv.shape[0]


def pages_that_fit(
    shape: PageShape,
    *,
    num_pages: int | None = None,
    num_bytes: int | None = None,
    fraction: float | None = None,
    free_bytes: int,
) -> int:
    """How many pages a pool gets: from a count, else a byte budget, else a fraction of the free memory.

    Raises:
        ConfigError: the setting leaves not even one page, or more than the free memory holds.
    """
    if num_pages is not None:
        if num_pages < 1:
            raise ConfigError("num_pages", num_pages, "at least 1")
        if num_pages * shape.page_bytes > free_bytes:
            raise ConfigError("num_pages", num_pages, f"at most {free_bytes // shape.page_bytes}, what fits in memory")
        return num_pages
    if num_bytes is None:
        if fraction is None or not 0 < fraction <= 1:
            raise ConfigError("pool_fraction", fraction, "above 0 and at most 1")
        num_bytes = int(free_bytes * fraction)
    elif num_bytes > free_bytes:
        raise ConfigError("pool_bytes", num_bytes, f"at most {free_bytes}, the free memory")
    count = num_bytes // shape.page_bytes
    if count < 1:
        raise ConfigError("pool_bytes", num_bytes, f"at least {shape.page_bytes}, the size of one page")
    return count
