"""Who moves what in the race of the moves (moves.py): our kernels, and the best plain PyTorch beside each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bench.kernels.cases import Shape
from bench.kernels.timing import Act, rotation
from radixkv_kernels.copies import copy_heads
from radixkv_kernels.transfers import COPY_ENGINE_MIN_BYTES, HOST_PROGRAMS, from_host, pack, to_host, unpack
from radixkv_kernels.writes import rotate_write_kv, write_kv

__all__ = ["Bench", "Contest", "copy_contest", "page_contests", "transfer_contests", "write_contests"]


@dataclass(frozen=True, slots=True)
class Contest:
    """Several ways to move the same bytes.

    Attributes:
        name, num_bytes: bytes read and written, together; over PCIe those that cross it.
        acts: by name, ours first.
        poison: makes the inputs what they were, and the output nonsense.
        output: copies of what act 0 wrote.
        cycle: inputs that acts go through.
    """

    name: str
    num_bytes: float
    acts: Mapping[str, Act]
    poison: Callable[[], object]
    output: Callable[[], list[torch.Tensor]]
    cycle: int = 1


class Bench:
    """The store, and random places in it."""

    def __init__(self, shape: Shape, num_pages: int, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        self.shape, self.device, self.num_pages = shape, device, num_pages
        self.kv = self.store(num_pages, shape.page_size)

    def store(self, num_pages: int, page_size: int) -> torch.Tensor:
        """Pages of random numbers."""
        shape = self.shape
        size = (num_pages, shape.num_layers, 2, page_size, shape.num_kv_heads, shape.head_dim)
        return torch.empty(size, dtype=shape.dtype, device=self.device).normal_()

    def some(self, count: int, most: int) -> torch.Tensor:
        """[count] different numbers below `most`, in no order."""
        return torch.randperm(most, device=self.device)[:count]

    def rows(self, num_tokens: int, cycle: int) -> list[tuple[torch.Tensor, ...]]:
        """Query, key and value as a model's one projection makes them, views of one tensor, for each layer of the cycle."""
        shape = self.shape
        heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        size = (num_tokens, sum(heads), shape.head_dim)
        return [torch.randn(size, device=self.device).to(shape.dtype).split(heads, dim=1) for _ in range(cycle)]


def write_contests(bench: Bench, num_tokens: int, compiled: bool) -> Iterator[Contest]:
    """New keys and values into slots, without and with the rotary embedding."""
    shape, kv = bench.shape, bench.kv
    element = shape.head_dim * shape.dtype.itemsize * num_tokens
    cycle = rotation(4 * shape.num_kv_heads * element, shape.num_layers)
    rows = bench.rows(num_tokens, cycle)
    originals = [query.clone() for query, _, _ in rows]
    slots = bench.some(num_tokens, bench.num_pages * shape.page_size)
    pages, offsets = slots // shape.page_size, slots % shape.page_size
    lines = kv.view(-1, shape.num_kv_heads * shape.head_dim)  # a token's keys or values in one layer, one a line
    key_line = [((pages * shape.num_layers + k) * 2) * shape.page_size + offsets for k in range(cycle)]
    value_line = [line + shape.page_size for line in key_line]
    angle = torch.rand(num_tokens, shape.head_dim, device=bench.device) * 6.3
    cos, sin = angle.cos().to(shape.dtype), angle.sin().to(shape.dtype)

    def by_index_put(k: int) -> None:
        kv[:, k, 0][pages, offsets], kv[:, k, 1][pages, offsets] = rows[k][1], rows[k][2]

    def by_index_copy(k: int, key: torch.Tensor) -> None:
        lines.index_copy_(0, key_line[k], key.flatten(1))
        lines.index_copy_(0, value_line[k], rows[k][2].flatten(1))

    def rotated(k: int, rotary: Callable[..., Any]) -> torch.Tensor:
        query, key = rotary(rows[k][0], rows[k][1], cos, sin)
        rows[k][0].copy_(query)
        return key

    def poison() -> None:
        kv[:, 0].fill_(-77)
        for (query, _, _), original in zip(rows, originals, strict=True):
            query.copy_(original)

    acts: dict[str, Act] = {
        "write_kv": lambda k: write_kv(rows[k][1], rows[k][2], kv[:, k], slots),
        "index_put_": by_index_put,
        "index_copy_": lambda k: by_index_copy(k, rows[k][1]),
    }
    num_bytes = 4 * shape.num_kv_heads * element
    yield Contest(f"write {num_tokens} tokens", num_bytes, acts, poison, lambda: [kv[:, 0].clone()], cycle)
    acts = {
        "rotate_write_kv": lambda k: rotate_write_kv(*rows[k], cos, sin, kv[:, k], slots),
        "eager rotary, index_copy_": lambda k: by_index_copy(k, rotated(k, apply_rotary_pos_emb)),
    }
    if compiled:
        fused = torch.compile(apply_rotary_pos_emb, dynamic=True)
        acts["compiled rotary, write_kv"] = lambda k: write_kv(rotated(k, fused), rows[k][2], kv[:, k], slots)
    num_bytes += 2 * shape.num_heads * element
    name = f"rotate and write {num_tokens} tokens"
    yield Contest(name, num_bytes, acts, poison, lambda: [rows[0][0].clone(), kv[:, 0].clone()], cycle)


def copy_contest(bench: Bench, num_copies: int) -> Contest:
    """The first half of pages to other pages."""
    kv, count = bench.kv, bench.shape.page_size // 2
    pages = bench.some(2 * num_copies, bench.num_pages)
    sources, targets = pages[:num_copies], pages[num_copies:]
    counts = torch.full((num_copies,), count, device=bench.device)
    pairs = list(zip(sources.tolist(), targets.tolist(), strict=True))

    def by_index(_: int) -> None:
        kv[targets, :, :, :count] = kv[sources, :, :, :count]

    def one_by_one(_: int) -> None:
        for source, target in pairs:
            kv[target, :, :, :count].copy_(kv[source, :, :, :count])

    acts = {"copy_heads": lambda _: copy_heads(kv, sources, targets, counts), "index": by_index, "copy_ each": one_by_one}
    name, num_bytes = f"copy {count} tokens of {num_copies} pages", 2 * kv[0].nbytes * num_copies / 2
    return Contest(name, num_bytes, acts, lambda: kv.index_fill_(0, targets, -77), lambda: [kv[pages]])


def page_contests(bench: Bench, num_pages: int) -> Iterator[Contest]:
    """Whole pages on the device."""
    kv, pages = bench.kv, bench.some(num_pages, bench.num_pages)
    packed = torch.empty_like(kv[:num_pages])
    acts: dict[str, Act] = {
        "pack": lambda _: pack(kv, pages, packed),
        "index_select": lambda _: torch.index_select(kv, 0, pages, out=packed),
    }
    num_bytes = 2 * packed.nbytes
    yield Contest(f"pack {num_pages} pages", num_bytes, acts, lambda: packed.fill_(-77), lambda: [packed.clone()])
    packed.normal_()
    acts = {"unpack": lambda _: unpack(packed, kv, pages), "index_copy_": lambda _: kv.index_copy_(0, pages, packed)}
    yield Contest(f"unpack {num_pages} pages", num_bytes, acts, lambda: kv.index_fill_(0, pages, -77), lambda: [kv[pages]])


def transfer_contests(bench: Bench, page_size: int, num_bytes: int) -> Iterator[Contest]:
    """Pages to and from pinned host memory."""
    page_bytes = bench.shape.token_bytes * bench.shape.num_layers * page_size
    num_pages = num_bytes // page_bytes
    store = bench.store(4 * num_pages, page_size)
    index = bench.some(num_pages, 4 * num_pages)
    pages, staging = index.cpu().numpy(), torch.empty_like(store[:num_pages])
    host = torch.empty(staging.shape, dtype=staging.dtype, pin_memory=bench.device.type == "cuda")
    default = "copies" if page_bytes >= COPY_ENGINE_MIN_BYTES else f"kernel, {HOST_PROGRAMS} programs"
    about = f"{num_pages} pages of {page_bytes >> 10} KiB (default: {default})"

    def staged_out(_: int) -> None:
        torch.index_select(store, 0, index, out=staging)
        host.copy_(staging, non_blocking=True)

    def staged_in(_: int) -> None:
        staging.copy_(host, non_blocking=True)
        store.index_copy_(0, index, staging)

    out: dict[str, Act] = {"copies": lambda _: to_host(store, pages, host, way="copies"), "gather, one copy_": staged_out}
    into: dict[str, Act] = {
        "copies": lambda _: from_host(host, store, pages, way="copies"),
        "one copy_, scatter": staged_in,
    }
    for programs in (16, 32, 64, 132):
        name = f"kernel, {programs} programs"
        out[name] = lambda _, programs=programs: to_host(store, pages, host, way="kernel", programs=programs)
        into[name] = lambda _, programs=programs: from_host(host, store, pages, way="kernel", programs=programs)
    yield Contest(f"to host, {about}", host.nbytes, out, lambda: host.fill_(-77), lambda: [host.clone()])
    host.normal_()
    yield Contest(f"from host, {about}", host.nbytes, into, lambda: store.index_fill_(0, index, -77), lambda: [store[index]])
