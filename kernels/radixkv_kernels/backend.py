"""Whether Triton can run: it is there, and the tensors are on a GPU, or its interpreter is switched on."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without
    triton = tl = None

__all__ = ["can_launch", "jit", "on_device_of", "tl", "triton"]

log = logging.getLogger("radixkv.kernels")

_INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)  # settled when kernels are defined


def jit(kernel: Any = None, **options: Any) -> Any:
    """`triton.jit` where Triton is there; else the kernel stays a plain function that nobody calls.

    Args:
        kernel: to decorate.
        options: of `triton.jit`, such as `do_not_specialize=["num_tokens"]`: numbers that change from call to call, for
            which nothing is to be compiled anew.
    """
    if kernel is None:
        return lambda later: jit(later, **options)
    return kernel if triton is None else triton.jit(kernel, **options)


def can_launch(tensor: torch.Tensor) -> bool:
    """Whether kernels can run on this tensor; where not, the references do, and the log says so once."""
    if triton is None:
        if tensor.is_cuda:
            _say_once("Triton is not installed: the plain PyTorch kernels run, many times slower")
        return False
    return tensor.is_cuda or _INTERPRETED


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Within, kernels are launched where this tensor is; Triton itself takes the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def _say_once(text: str) -> None:
    log.warning("%s", text)
