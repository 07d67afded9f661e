"""How the move kernels refuse what they cannot take: from shapes, strides, dtypes and devices alone, never from values."""

from __future__ import annotations

import torch

__all__ = ["KernelInputError", "check_index", "check_kv_layer", "check_like", "check_store", "power_of_two"]


class KernelInputError(ValueError):
    """A kernel was given a tensor it cannot take.

    Attributes:
        kernel: its name.
        argument: which tensor.
    """

    def __init__(self, kernel: str, argument: str, wanted: str, given: object) -> None:
        self.kernel, self.argument = kernel, argument
        super().__init__(f"{kernel}: {argument} is {given}; it must be {wanted}")


def power_of_two(count: int) -> int:
    """The least power of two that is at least `count`: the length of a tile that covers it."""
    return 1 << max(count - 1, 0).bit_length()


def check_kv_layer(kernel: str, kv: torch.Tensor) -> None:
    """Refuse what is not one layer's part of a page store, [P, 2, S, H, D] with D contiguous."""
    if kv.dim() != 5 or kv.shape[1] != 2:
        raise KernelInputError(kernel, "kv", "one layer of the page store, [P, 2, S, H, D]", list(kv.shape))
    if kv.stride(4) != 1:
        raise KernelInputError(kernel, "kv", "strided with D contiguous", f"strided {kv.stride()}")


def check_like(kernel: str, argument: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Refuse a tensor of another shape, or of another dtype or device than `like`, or whose last dimension is strided."""
    if tensor.shape != shape:
        raise KernelInputError(kernel, argument, f"of shape {list(shape)}", f"of shape {list(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise KernelInputError(kernel, argument, f"{like.dtype} on {like.device}", f"{tensor.dtype} on {tensor.device}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise KernelInputError(kernel, argument, "contiguous in its last dimension", f"strided {tensor.stride()}")


def check_index(kernel: str, argument: str, index: torch.Tensor, count: int, like: torch.Tensor) -> None:
    """Refuse what is not `count` int64 numbers in one run on the device of `like`."""
    if index.shape != (count,) or index.dtype != torch.int64 or index.device != like.device:
        given = f"{index.dtype} of shape {list(index.shape)} on {index.device}"
        raise KernelInputError(kernel, argument, f"torch.int64 of shape [{count}] on {like.device}", given)
    if count > 1 and index.stride(0) != 1:
        raise KernelInputError(kernel, argument, "contiguous", f"strided {index.stride()}")


def check_store(kernel: str, argument: str, store: torch.Tensor) -> None:
    """Refuse what is not a run of whole pages, [P, L, 2, S, H, D], contiguous."""
    if store.dim() != 6 or store.shape[2] != 2:
        raise KernelInputError(kernel, argument, "whole pages, [P, L, 2, S, H, D]", f"of shape {list(store.shape)}")
    if not store.is_contiguous():
        raise KernelInputError(kernel, argument, "contiguous", f"strided {store.stride()}")
