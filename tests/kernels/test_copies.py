"""Copying the first tokens of pages."""

import pytest
import torch

from radixkv_kernels.copies import copy_heads, copy_heads_ref
from radixkv_kernels.inputs import KernelInputError


def random_store(dtype, num_pages, num_layers, page_size, num_heads, head_dim, device):
    """Pages of random bits, NaNs among them."""
    shape = (num_pages, num_layers, 2, page_size, num_heads, head_dim * dtype.itemsize)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device).view(dtype)


def bits(tensor):
    return tensor.view(torch.uint8)


@pytest.mark.parametrize(
    ("dtype", "page_size", "num_heads", "head_dim"),
    [
        (torch.bfloat16, 16, 2, 64),
        (torch.float16, 4, 1, 80),
        (torch.float32, 1, 3, 96),
        (torch.bfloat16, 64, 1, 128),
        (torch.float32, 16, 1, 256),
    ],
)
def test_heads_are_bitwise_copied_and_everything_else_stays(dtype, page_size, num_heads, head_dim, device):
    store = random_store(dtype, 9, 2, page_size, num_heads, head_dim, device)
    order = torch.randperm(9, device=device)
    sources, targets = order[:4], order[4:8]
    counts = torch.tensor([0, page_size, (page_size + 1) // 2, 1], device=device)
    before, expected = store.clone(), store.clone()
    copy_heads(store, sources, targets, counts)
    copy_heads_ref(expected, sources, targets, counts)
    assert torch.equal(bits(store), bits(expected))
    for source, target, count in zip(*(index.tolist() for index in (sources, targets, counts)), strict=True):
        assert torch.equal(bits(store[target, :, :, :count]), bits(before[source, :, :, :count]))
        assert torch.equal(bits(store[target, :, :, count:]), bits(before[target, :, :, count:]))


def test_seventeen_copies_go_in_one_call(device):
    store = random_store(torch.bfloat16, 40, 1, 4, 1, 64, device)
    order = torch.randperm(40, device=device)
    expected = store.clone()
    arguments = order[:17], order[17:34], torch.arange(17, device=device) % 5
    copy_heads(store, *arguments)
    copy_heads_ref(expected, *arguments)
    assert torch.equal(bits(store), bits(expected))


def test_a_page_may_be_the_source_of_several_copies(device):
    store = random_store(torch.float16, 4, 1, 4, 2, 64, device)
    copy_heads(
        store,
        torch.tensor([2, 2, 2], device=device),
        torch.tensor([0, 1, 3], device=device),
        torch.full((3,), 4, device=device),
    )
    assert all(torch.equal(bits(page), bits(store[2])) for page in store)


def test_a_page_copied_to_itself_and_no_pages_at_all_change_nothing(device):
    store = random_store(torch.float32, 3, 1, 4, 1, 64, device)
    before = store.clone()
    none = torch.empty(0, dtype=torch.int64, device=device)
    copy_heads(store, none, none, none)
    one = torch.tensor([1], device=device)
    copy_heads(store, one, one, torch.tensor([3], device=device))
    assert torch.equal(bits(store), bits(before))


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("kv", torch.zeros(3, 2, 4, 1, 64)),
        ("kv", torch.zeros(3, 1, 3, 4, 1, 64)),
        ("kv", torch.zeros(2, 3, 2, 4, 1, 64).transpose(0, 1)),
        ("sources", torch.arange(2, dtype=torch.int32)),
        ("targets", torch.arange(3)),
        ("counts", torch.arange(4)[::2]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(argument, bad):
    good = {"kv": torch.zeros(3, 1, 2, 4, 1, 64)} | {name: torch.arange(2) for name in ("sources", "targets", "counts")}
    with pytest.raises(KernelInputError, match=f"copy_heads: {argument} is .*; it must be "):
        copy_heads(**good | {argument: bad})
