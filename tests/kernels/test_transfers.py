"""Whole pages, packed and unpacked, and moved between a device and the host."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from radixkv_kernels.inputs import KernelInputError
from radixkv_kernels.transfers import from_host, pack, pack_ref, to_host, unpack, unpack_ref

SHAPES = [
    # dtype, layers, page size, KV heads, head dim
    (torch.bfloat16, 2, 16, 2, 64),
    (torch.float16, 1, 4, 1, 80),
    (torch.float32, 3, 1, 3, 96),
    (torch.bfloat16, 1, 64, 1, 128),
    (torch.float16, 1, 1, 1, 1),
    (torch.float32, 1, 16, 1, 256),
]


def random_pages(dtype, num_pages, shape, device, *, pinned=False):
    """Pages of random bits, NaNs among them."""
    layers, page_size, heads, head_dim = shape
    size = (num_pages, layers, 2, page_size, heads, head_dim * dtype.itemsize)
    return torch.randint(0, 256, size, dtype=torch.uint8, device=device, pin_memory=pinned).view(dtype)


def on_the_host(dtype, num_pages, shape, device):
    return random_pages(dtype, num_pages, shape, "cpu", pinned=device.type == "cuda")


def bits(tensor):
    return tensor.view(torch.uint8).cpu()


@pytest.mark.parametrize("num_pages", [1, 17])
@pytest.mark.parametrize(("dtype", "layers", "page_size", "heads", "head_dim"), SHAPES)
def test_packing_is_bitwise_the_reference(dtype, layers, page_size, heads, head_dim, num_pages, device):
    shape = (layers, page_size, heads, head_dim)
    store, out = random_pages(dtype, 20, shape, device), random_pages(dtype, num_pages, shape, device)
    before, expected = store.clone(), out.clone()
    pages = torch.randperm(20, device=device)[:num_pages]
    pack(store, pages, out)
    pack_ref(store, pages, expected)
    assert torch.equal(bits(out), bits(expected))
    assert torch.equal(bits(store), bits(before))


@pytest.mark.parametrize("num_pages", [1, 17])
@pytest.mark.parametrize(("dtype", "layers", "page_size", "heads", "head_dim"), SHAPES)
def test_unpacking_is_bitwise_the_reference_and_other_pages_stay(
    dtype, layers, page_size, heads, head_dim, num_pages, device
):
    shape = (layers, page_size, heads, head_dim)
    store, packed = random_pages(dtype, 20, shape, device), random_pages(dtype, num_pages, shape, device)
    expected = store.clone()
    pages = torch.randperm(20, device=device)[:num_pages]
    unpack(packed, store, pages)
    unpack_ref(packed, expected, pages)
    assert torch.equal(bits(store), bits(expected))


def test_a_page_may_be_packed_twice(device):
    store = random_pages(torch.float32, 3, (1, 4, 1, 64), device)
    out = torch.empty_like(store)
    pack(store, torch.tensor([2, 0, 2], device=device), out)
    assert torch.equal(bits(out), bits(store[[2, 0, 2]]))


def test_no_pages_move_nothing(device):
    store = random_pages(torch.bfloat16, 3, (1, 4, 1, 64), device)
    before, none = store.clone(), store[:0]
    index = torch.empty(0, dtype=torch.int64, device=device)
    pack(store, index, none)
    unpack(none, store, index)
    host = on_the_host(torch.bfloat16, 1, (1, 4, 1, 64), device)[:0]
    for way in ("copies", "kernel"):
        to_host(store, [], host, way=way)
        from_host(host, store, [], way=way)
    assert torch.equal(bits(store), bits(before))


@pytest.mark.parametrize("way", ["copies", "kernel", None])
@pytest.mark.parametrize(("dtype", "layers", "page_size", "heads", "head_dim"), SHAPES[:4])
def test_pages_come_back_from_the_host_with_their_bits(dtype, layers, page_size, heads, head_dim, way, device):
    shape = (layers, page_size, heads, head_dim)
    store = random_pages(dtype, 20, shape, device)
    before = store.clone()
    host = on_the_host(dtype, 7, shape, device)
    pages = [3, 4, 5, 19, 0, 12, 11]  # a run of adjacent pages, the last and the first, a falling pair
    moved = to_host(store, pages, host, way=way)
    assert (moved is None) == (device.type == "cpu")
    if moved is not None:
        moved.synchronize()
    assert torch.equal(bits(host), bits(before[pages]))
    assert torch.equal(bits(store), bits(before))
    elsewhere = np.array([8, 1, 2, 9, 10, 18, 13])
    from_host(host, store, elsewhere, way=way)
    assert torch.equal(bits(store[elsewhere]), bits(before[pages]))
    others = np.setdiff1d(np.arange(20), elsewhere)
    assert torch.equal(bits(store[others]), bits(before[others]))


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("kv", torch.zeros(3, 2, 4, 1, 64)),
        ("out", torch.zeros(2, 1, 2, 8, 1, 64)),
        ("out", torch.zeros(2, 1, 2, 4, 1, 64, dtype=torch.bfloat16)),
        ("out", torch.zeros(2, 1, 2, 4, 1, 64, device="meta")),
        ("out", torch.zeros(2, 1, 2, 4, 1, 128)[..., ::2]),
        ("pages", torch.arange(3)),
        ("pages", torch.arange(2, dtype=torch.int32)),
    ],
)
def test_what_does_not_fit_is_refused_by_name(argument, bad):
    good = {"kv": torch.zeros(3, 1, 2, 4, 1, 64), "pages": torch.arange(2), "out": torch.zeros(2, 1, 2, 4, 1, 64)}
    with pytest.raises(KernelInputError, match=f"pack: {argument} is .*; it must be "):
        pack(**good | {argument: bad})


@pytest.mark.parametrize("pages", [[0, 3], [-1, 0], [0], [0, 1, 2]])
def test_pages_outside_the_store_or_not_as_many_as_the_host_has_are_refused(pages, device):
    store = random_pages(torch.float32, 3, (1, 4, 1, 64), device)
    host = on_the_host(torch.float32, 2, (1, 4, 1, 64), device)
    before = host.clone()
    for move in (lambda: to_host(store, pages, host), lambda: from_host(host, store, pages)):
        with pytest.raises(KernelInputError, match=r"pages is .*; it must be "):
            move()
    assert torch.equal(bits(host), bits(before))


@pytest.mark.gpu
def test_pageable_memory_is_refused(device):
    store = random_pages(torch.float32, 3, (1, 4, 1, 64), device)
    with pytest.raises(KernelInputError, match="host is pageable memory; it must be pinned"):
        to_host(store, [0], torch.empty_like(store[:1], device="cpu"))


def slow_work(device):
    """Some milliseconds of work on the current stream."""
    matrix = torch.randn(4096, 4096, device=device)
    for _ in range(10):
        matrix = matrix @ matrix.clamp(-1e-2, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["copies", "kernel"])
def test_a_transfer_on_another_stream_waits_for_the_writer_and_its_reader_for_it(way, device):
    shape = (4, 16, 8, 128)
    store, fresh = random_pages(torch.bfloat16, 40, shape, device), random_pages(torch.bfloat16, 40, shape, device)
    expected = fresh.clone()
    host = on_the_host(torch.bfloat16, 20, shape, device)
    pages, back = list(range(0, 40, 2)), list(range(1, 40, 2))
    side = torch.cuda.Stream(device)
    slow_work(device)
    store.copy_(fresh)  # late: the transfer is enqueued while this waits
    to_host(store, pages, host, way=way, stream=side)
    done = from_host(host, store, back, way=way, stream=side)
    done.wait()  # the current stream, not the host
    read = store.clone()
    expected[back] = fresh[pages]
    assert torch.equal(bits(read), bits(expected))
    done.synchronize()
    assert torch.equal(bits(host), bits(fresh[pages]))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["copies", "kernel"])
def test_a_transfer_waits_for_the_event_it_is_told_to_wait_for(way, device):
    store, fresh = (random_pages(torch.bfloat16, 40, (4, 16, 8, 128), device) for _ in range(2))
    host = on_the_host(torch.bfloat16, 40, (4, 16, 8, 128), device)
    writer, side = torch.cuda.Stream(device), torch.cuda.Stream(device)
    torch.cuda.synchronize()
    with torch.cuda.stream(writer):
        slow_work(device)
        store.copy_(fresh)
        written = writer.record_event()
    to_host(store, range(40), host, way=way, stream=side, after=written).synchronize()
    assert torch.equal(bits(host), bits(fresh))


WITHOUT_KERNELS = """
import torch
from radixkv_kernels import backend, copies, transfers, writes
assert not backend.can_launch(torch.zeros(1))
store, pages = torch.randn(4, 1, 2, 4, 1, 8), torch.tensor([3, 1])
before, packed = store.clone(), store[pages]
transfers.pack(store, pages, packed)
transfers.unpack(packed, store, pages.flip(0))
assert torch.equal(store[[1, 3]], before[[3, 1]])
transfers.from_host(transfers.to_host(store, [0, 2], packed) or packed, store, [2, 0])
assert torch.equal(store, before[[2, 3, 0, 1]])
copies.copy_heads(store, pages[:1], pages[1:], torch.tensor([2]))
assert torch.equal(store[1, :, :, :2], store[3, :, :, :2])
key = torch.randn(1, 1, 8)
writes.write_kv(key, key, store[:, 0], torch.tensor([5]))
assert torch.equal(store[1, 0, 0, 1], key[0])
writes.rotate_write_kv(key.clone(), key, key, torch.ones(1, 8), torch.zeros(1, 8), store[:, 0], torch.tensor([6]))
assert torch.equal(store[1, 0, :, 2], key.expand(2, 1, 8))
"""


@pytest.mark.parametrize("prelude", ["", "import sys; sys.modules['triton'] = None"], ids=["no interpreter", "no Triton"])
def test_on_a_cpu_without_kernels_the_references_do_the_work(prelude):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", f"{prelude}\n{WITHOUT_KERNELS}"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
