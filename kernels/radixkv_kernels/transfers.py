"""Whole pages, gathered and scattered: on one device, and between a device and pinned host memory.

    page store  7 │ 2 │ 9 │ 4 │ ...     ── pack, to_host ──▶     2 │ 4 │ 7     [n, L, 2, S, H, D], in the order asked
                                        ◀── unpack, from_host ──

Formula:  pack, to_host: out[i] = kv[pages[i]]; unpack, from_host: kv[pages[i]] = packed[i], for each i < n.
Tensors:  kv      [P, L, 2, S, H, D]  contiguous  the page store
          packed  [n, L, 2, S, H, D]  contiguous  also out, host; the dtype of kv; pinned where the host's and kv is on CUDA
          pages   [n] int64           contiguous  page ids: on the device for pack and unpack, on the host for the others
Grid:     (programs): one program takes every programs-th BLOCK of 32-bit words of the n pages. On one device there are as
          many programs as blocks; to and from the host few, so that most of the device goes on computing.
Bytes:    n pages read, n pages written.
Numerics: words are moved, not numbers: bitwise.
Needs:    no page twice in unpack and from_host. int64 offsets. Over PCIe the host's side must stay owned, and the pages
          untouched, until the event returned has fired.
Source:   ours. The two ways over PCIe are those measured in docs/design/0002-page-major.md.

Two ways over PCIe. "copies": the copy engine moves each run of adjacent pages as one copy and takes no multiprocessor, but
each copy costs the host some 20 us to issue, as long as PCIe takes for 1 MiB. "kernel": the device reads or writes pinned
memory by itself; one launch whatever the pages' size, but some multiprocessors are busy with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from radixkv_kernels.backend import can_launch, jit, on_device_of, tl
from radixkv_kernels.inputs import KernelInputError, check_index, check_store, power_of_two

__all__ = [
    "COPY_ENGINE_MIN_BYTES",
    "HOST_PROGRAMS",
    "Way",
    "from_host",
    "pack",
    "pack_ref",
    "to_host",
    "unpack",
    "unpack_ref",
]

Way = Literal["copies", "kernel"]

COPY_ENGINE_MIN_BYTES = 1 << 20
"""Pages of at least this many bytes go through the copy engine by default: below, issuing copies is the slower part.
From an H100: 2 MiB pages move at 50.5 GB/s as copies and 50.7 by kernel, 64 KiB pieces at 3.2 as copies
(docs/design/0002-page-major.md); `python -m bench.kernels.moves` measures both again."""

HOST_PROGRAMS = 32
"""Programs of way="kernel". With 16 KiB each in flight they are five times what hides 2 us of latency at 55 GB/s; not yet
tuned: `python -m bench.kernels.moves` times others."""

_TILE = 4096  # 32-bit words: eight 16-byte accesses a thread, all in flight at once


def pack(kv: torch.Tensor, pages: torch.Tensor, out: torch.Tensor) -> None:
    """Gather whole pages into one run, on one device.

    Cost:    one launch; n pages read and written. Nothing is read back or synchronised on the host.
    Mutates: out.
    Args:    kv: [P, L, 2, S, H, D]; pages: [n] int64; out: [n, L, 2, S, H, D]; all on one device.
    Raises:  KernelInputError: a shape, stride, dtype or device that does not fit.
    """
    _check_packed("pack", kv, "out", out)
    check_index("pack", "pages", pages, len(out), kv)
    if can_launch(kv):
        _launch(kv, out, pages, gather=True)
    else:
        pack_ref(kv, pages, out)


def pack_ref(kv: torch.Tensor, pages: torch.Tensor, out: torch.Tensor) -> None:
    """The same in plain PyTorch."""
    torch.index_select(kv, 0, pages, out=out)


def unpack(packed: torch.Tensor, kv: torch.Tensor, pages: torch.Tensor) -> None:
    """Scatter a run of whole pages over the store, on one device.

    Cost:    one launch; n pages read and written. Nothing is read back or synchronised on the host.
    Mutates: the pages named, nothing else.
    Args:    packed: [n, L, 2, S, H, D]; kv: [P, L, 2, S, H, D]; pages: [n] int64, no page twice; all on one device.
    Raises:  KernelInputError: a shape, stride, dtype or device that does not fit.
    """
    _check_packed("unpack", kv, "packed", packed)
    check_index("unpack", "pages", pages, len(packed), kv)
    if can_launch(kv):
        _launch(packed, kv, pages, gather=False)
    else:
        unpack_ref(packed, kv, pages)


def unpack_ref(packed: torch.Tensor, kv: torch.Tensor, pages: torch.Tensor) -> None:
    """The same in plain PyTorch."""
    kv.index_copy_(0, pages, packed)


def to_host(
    kv: torch.Tensor,
    pages: Sequence[int] | npt.NDArray[np.integer],
    host: torch.Tensor,
    *,
    way: Way | None = None,
    programs: int = HOST_PROGRAMS,
    stream: torch.cuda.Stream | None = None,
    after: torch.cuda.Event | None = None,
) -> torch.cuda.Event | None:
    """Copy pages of a device's store to pinned host memory. On CUDA only enqueued.

    Cost:    n pages over PCIe; on the host one copy for each run of adjacent pages, or one launch.
    Mutates: host; complete when the event has fired.
    Args:    kv: [P, L, 2, S, H, D]; pages: [n] ids on the host; host: [n, L, 2, S, H, D].
             way: None takes "copies" for pages of at least COPY_ENGINE_MIN_BYTES, else "kernel".
             programs: how many take part in "kernel"; fewer leave more of the device to others.
             stream: where to enqueue; None is the current stream.
             after: what to wait for first, on the device; None is all that the current stream has been given so far.
    Returns: the event that fires when the bytes are there; None where kv is not on CUDA: they are.
    Raises:  KernelInputError: a tensor that does not fit, a host side that is not pinned, a page id outside the store.
    """
    return _transfer("to_host", kv, pages, host, way, programs, stream, after)


def from_host(
    host: torch.Tensor,
    kv: torch.Tensor,
    pages: Sequence[int] | npt.NDArray[np.integer],
    *,
    way: Way | None = None,
    programs: int = HOST_PROGRAMS,
    stream: torch.cuda.Stream | None = None,
    after: torch.cuda.Event | None = None,
) -> torch.cuda.Event | None:
    """Copy pages from pinned host memory into a device's store. On CUDA only enqueued.

    Mutates: the pages named, nothing else; a stream that reads them must wait for the event first.
    Cost, Args, Returns, Raises: as to_host; no page twice.
    """
    return _transfer("from_host", kv, pages, host, way, programs, stream, after)


def _transfer(
    name: Literal["to_host", "from_host"],
    kv: torch.Tensor,
    pages: Sequence[int] | npt.NDArray[np.integer],
    host: torch.Tensor,
    way: Way | None,
    programs: int,
    stream: torch.cuda.Stream | None,
    after: torch.cuda.Event | None,
) -> torch.cuda.Event | None:
    ids = np.asarray(pages, np.int64)
    _check_packed(name, kv, "host", host, device=torch.device("cpu"))
    _check_ids(name, ids, kv, host)
    if way is None:
        way = "copies" if kv[:1].nbytes >= COPY_ENGINE_MIN_BYTES or not can_launch(kv) else "kernel"
    move = _by_copies if way == "copies" else partial(_by_kernel, programs=programs)
    if not kv.is_cuda:
        move(name, kv, ids, host)
        return None
    if len(host) and not host.is_pinned():
        raise KernelInputError(name, "host", "pinned (torch.empty(..., pin_memory=True))", "pageable memory")
    current = torch.cuda.current_stream(kv.device)
    stream = stream or current
    if after is not None:
        stream.wait_event(after)
    elif stream != current:
        stream.wait_stream(current)
    with torch.cuda.stream(stream):
        move(name, kv, ids, host)
        return stream.record_event()


def _by_copies(name: str, kv: torch.Tensor, ids: npt.NDArray[np.int64], host: torch.Tensor) -> None:
    """One copy for each run of adjacent pages."""
    bounds = np.flatnonzero(np.diff(ids, prepend=-2, append=-2) != 1).tolist() if len(ids) else []
    for first, last in pairwise(bounds):
        page = int(ids[first])
        on_device, on_host = kv[page : page + last - first], host[first:last]
        if name == "to_host":
            on_host.copy_(on_device, non_blocking=True)
        else:
            on_device.copy_(on_host, non_blocking=True)


def _by_kernel(name: str, kv: torch.Tensor, ids: npt.NDArray[np.int64], host: torch.Tensor, programs: int) -> None:
    """One launch that reads or writes the host's memory itself."""
    if not can_launch(kv):
        raise KernelInputError(name, "kv", 'on CUDA with Triton installed for way="kernel"', f"on {kv.device}")
    pages = torch.from_numpy(ids)
    if kv.is_cuda:  # pinned, or a long list would wait for the device
        pages = pages.pin_memory().to(kv.device, non_blocking=True)
    if name == "to_host":
        _launch(kv, host, pages, gather=True, programs=programs)
    else:
        _launch(host, kv, pages, gather=False, programs=programs)


def _launch(
    source: torch.Tensor, target: torch.Tensor, pages: torch.Tensor, *, gather: bool, programs: int | None = None
) -> None:
    if not len(pages):
        return
    words = source[:1].nbytes // 4  # keys and values of 2 bytes or more: always whole words
    block = min(power_of_two(words), _TILE)
    blocks_a_page = -(-words // block)
    num_blocks = len(pages) * blocks_a_page
    with on_device_of(pages):
        _move_pages_kernel[min(programs or num_blocks, num_blocks),](
            *(source.view(-1).view(torch.int32), target.view(-1).view(torch.int32), pages, num_blocks, words),
            GATHER=gather,
            BLOCKS_A_PAGE=blocks_a_page,
            BLOCK=block,
        )


def _check_packed(
    kernel: str, kv: torch.Tensor, argument: str, packed: torch.Tensor, device: torch.device | None = None
) -> None:
    check_store(kernel, "kv", kv)
    check_store(kernel, argument, packed)
    if packed.shape[1:] != kv.shape[1:] or packed.dtype != kv.dtype:
        wanted, given = ([*tensor.shape[1:], tensor.dtype] for tensor in (kv, packed))
        raise KernelInputError(kernel, argument, f"of pages {wanted}, as kv", f"of pages {given}")
    if packed.device != (device or kv.device):
        raise KernelInputError(kernel, argument, f"on {device or kv.device}", f"on {packed.device}")


def _check_ids(kernel: str, ids: npt.NDArray[np.int64], kv: torch.Tensor, host: torch.Tensor) -> None:
    if ids.shape != (len(host),):
        raise KernelInputError(kernel, "pages", f"{len(host)} page ids, as host has pages", f"of shape {list(ids.shape)}")
    if len(ids) and not 0 <= ids.min() <= ids.max() < len(kv):
        raise KernelInputError(kernel, "pages", f"ids from 0 to {len(kv) - 1}", f"from {ids.min()} to {ids.max()}")


@jit(do_not_specialize=["num_blocks"])
def _move_pages_kernel(
    source, target, pages, num_blocks, words,
    GATHER: tl.constexpr, BLOCKS_A_PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    length = tl.cast(words, tl.int64)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        place, word = block // BLOCKS_A_PAGE, (block % BLOCKS_A_PAGE) * BLOCK + tl.arange(0, BLOCK)
        page = tl.load(pages + place) * length
        packed = place * length
        inside = word < words
        if GATHER:
            tl.store(target + packed + word, tl.load(source + page + word, inside), inside)
        else:
            tl.store(target + page + word, tl.load(source + packed + word, inside), inside)
