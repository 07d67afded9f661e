"""Writing keys and values into slots, and the rotary embedding on the way."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from radixkv_kernels.inputs import KernelInputError
from radixkv_kernels.writes import rotate_write_kv, rotate_write_kv_ref, write_kv, write_kv_ref

CASES = [
    # dtype, tokens, KV heads, head dim, page size
    (torch.bfloat16, 17, 2, 64, 16),
    (torch.float16, 1, 1, 80, 4),
    (torch.float32, 17, 3, 96, 1),
    (torch.bfloat16, 123, 2, 128, 64),
    (torch.float32, 5, 8, 256, 16),
]


def one_layer(dtype, num_heads, head_dim, page_size, num_tokens, device):
    """A store's middle layer with room for the tokens, full of a value that no test writes."""
    num_pages = -(-num_tokens // page_size) + 2
    return torch.full((num_pages, 3, 2, page_size, num_heads, head_dim), -77.0, dtype=dtype, device=device)


def some_slots(num_tokens, store, device):
    """Different slots in no order, one in three of them -1."""
    slots = torch.randperm(store.shape[0] * store.shape[3])[:num_tokens]
    slots[2::3] = -1
    return slots.to(device)


def transposed(num_tokens, num_heads, head_dim, dtype, device):
    """[N, H, D] seen through transformers' [1, H, N, D]."""
    rows = torch.randn(1, num_heads, num_tokens, head_dim, device=device).clamp(-2.5, 2.5)
    return rows.to(dtype)[0].transpose(0, 1)


def cos_and_sin(num_tokens, rotary_dim, dtype, device):
    angle = torch.randn(num_tokens, rotary_dim, device=device) * 10
    return angle.cos().to(dtype), angle.sin().to(dtype)


def assert_rotated(given, wanted):
    """Bitwise; but Triton's interpreter cuts bf16 where every GPU rounds: there, three cuts' worth at values below four."""
    if given.is_cuda or given.dtype != torch.bfloat16:
        assert torch.equal(given, wanted)
    else:
        torch.testing.assert_close(given, wanted, rtol=0, atol=3 * 4 * 2**-7)


@pytest.mark.parametrize(("dtype", "num_tokens", "num_heads", "head_dim", "page_size"), CASES)
def test_a_write_is_bitwise_the_reference_and_touches_nothing_else(
    dtype, num_tokens, num_heads, head_dim, page_size, device
):
    store = one_layer(dtype, num_heads, head_dim, page_size, num_tokens, device)
    expected = store.clone()
    slots = some_slots(num_tokens, store, device)
    key = transposed(num_tokens, num_heads, head_dim, dtype, device)
    value = torch.randn(num_tokens, num_heads, head_dim, device=device).to(dtype)
    write_kv(key, value, store[:, 1], slots)
    write_kv_ref(key, value, expected[:, 1], slots)
    assert torch.equal(store, expected)
    assert (store[:, 0] == -77).all() and (store[:, 2] == -77).all()


def test_a_token_is_found_in_its_slot(device):
    store = one_layer(torch.float32, 2, 64, 4, 9, device)
    key, value = torch.randn(2, 3, 2, 64, device=device).unbind()
    write_kv(key, value, store[:, 1], torch.tensor([9, -1, 2], device=device))
    assert torch.equal(store[2, 1, 0, 1], key[0]) and torch.equal(store[2, 1, 1, 1], value[0])
    assert torch.equal(store[0, 1, 0, 2], key[2]) and torch.equal(store[0, 1, 1, 2], value[2])
    assert (store != -77).sum() == 4 * 2 * 64


def test_many_tokens_take_the_wider_tile_and_are_all_written(device):
    store = one_layer(torch.bfloat16, 1, 16, 16, 2051, device)
    expected = store.clone()
    slots = some_slots(2051, store, device)
    key, value = torch.randn(2, 2051, 1, 16, device=device).bfloat16().unbind()
    write_kv(key, value, store[:, 1], slots)
    write_kv_ref(key, value, expected[:, 1], slots)
    assert torch.equal(store, expected)


def test_nothing_is_written_for_no_tokens_or_for_rows_without_a_slot(device):
    store = one_layer(torch.float16, 2, 64, 4, 4, device)
    none = torch.empty(0, 2, 64, dtype=torch.float16, device=device)
    write_kv(none, none, store[:, 1], torch.empty(0, dtype=torch.int64, device=device))
    rows = torch.full((3, 2, 64), float("nan"), dtype=torch.float16, device=device)
    write_kv(rows, rows, store[:, 1], torch.full((3,), -1, device=device))
    assert (store == -77).all()


def test_nan_and_infinity_keep_their_bits(device):
    store = one_layer(torch.bfloat16, 1, 64, 4, 4, device)
    bits = torch.randint(-(1 << 15), 1 << 15, (2, 4, 1, 64), dtype=torch.int16, device=device)
    key, value = bits.view(torch.bfloat16).unbind()
    write_kv(key, value, store[:, 1], torch.arange(4, device=device))
    assert torch.equal(store[0, 1].view(torch.int16), bits)


@pytest.mark.parametrize(("dtype", "num_tokens", "num_heads", "head_dim", "page_size"), CASES)
@pytest.mark.parametrize("part", [1.0, 0.5])
def test_rotation_is_bitwise_the_reference_and_touches_nothing_else(
    dtype, num_tokens, num_heads, head_dim, page_size, part, device
):
    num_tokens = min(num_tokens, 17)
    store = one_layer(dtype, num_heads, head_dim, page_size, num_tokens, device)
    expected = store.clone()
    slots = some_slots(num_tokens, store, device)
    query = transposed(num_tokens, 3 * num_heads, head_dim, dtype, device)
    key = transposed(num_tokens, num_heads, head_dim, dtype, device)
    value = torch.randn(num_tokens, num_heads, head_dim, device=device).to(dtype)
    cos, sin = cos_and_sin(num_tokens, int(head_dim * part), dtype, device)
    wanted, untouched = query.clone(), key.clone()
    rotate_write_kv(query, key, value, cos, sin, store[:, 1], slots)
    rotate_write_kv_ref(wanted, key, value, cos, sin, expected[:, 1], slots)
    assert_rotated(query, wanted)
    assert_rotated(store[:, 1, 0], expected[:, 1, 0])
    assert torch.equal(store[:, 1, 1], expected[:, 1, 1])
    assert torch.equal(store[:, 1] == -77, expected[:, 1] == -77)
    assert (store[:, 0] == -77).all() and (store[:, 2] == -77).all()
    assert torch.equal(key, untouched)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotation_is_bitwise_what_transformers_does(dtype, device):
    store = one_layer(dtype, 2, 128, 16, 17, device)
    query, key = (torch.randn(1, heads, 17, 128, device=device).clamp(-2.5, 2.5).to(dtype) for heads in (4, 2))
    cos, sin = cos_and_sin(17, 128, dtype, device)
    expected_query, expected_key = apply_rotary_pos_emb(query, key, cos[None], sin[None])
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key)]
    rotate_write_kv(*rows, torch.zeros_like(rows[1]), cos, sin, store[:, 1], torch.arange(17, device=device))
    assert_rotated(query, expected_query)
    assert_rotated(store[:, 1, 0].flatten(0, 1)[:17], expected_key[0].transpose(0, 1))


def test_queries_of_rows_without_a_slot_are_rotated_too(device):
    store = one_layer(torch.float32, 1, 64, 4, 2, device)
    query, key = torch.ones(2, 1, 64, device=device), torch.ones(2, 1, 64, device=device)
    cos = torch.full((2, 64), 0.5, device=device)
    rotate_write_kv(query, key, key, cos, torch.zeros_like(cos), store[:, 1], torch.tensor([-1, -1], device=device))
    assert (query == 0.5).all() and (store == -77).all()


def good_inputs():
    tensors = {"key": torch.zeros(3, 2, 64), "value": torch.zeros(3, 2, 64), "kv": torch.zeros(2, 2, 4, 2, 64)}
    return tensors | {"slots": torch.arange(3)}


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("key", torch.zeros(3, 2, 32)),
        ("key", torch.zeros(6, 64)),
        ("key", torch.zeros(3, 2, 64, dtype=torch.bfloat16)),
        ("value", torch.zeros(4, 2, 64)),
        ("value", torch.zeros(3, 2, 128)[..., ::2]),
        ("kv", torch.zeros(2, 4, 2, 64)),
        ("kv", torch.zeros(2, 3, 4, 2, 64)),
        ("kv", torch.zeros(2, 2, 4, 64, 2).transpose(3, 4)),
        ("slots", torch.arange(3, dtype=torch.int32)),
        ("slots", torch.arange(4)),
        ("slots", torch.arange(6)[::2]),
        ("slots", torch.arange(3, device="meta")),
    ],
)
def test_what_does_not_fit_is_refused_by_name(argument, bad):
    with pytest.raises(KernelInputError, match=f"write_kv: {argument} is .*; it must be ") as refused:
        write_kv(**good_inputs() | {argument: bad})
    assert (refused.value.kernel, refused.value.argument) == ("write_kv", argument)


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("query", torch.zeros(2, 4, 64)),
        ("query", torch.zeros(3, 64)),
        ("cos", torch.zeros(3, 33)),
        ("cos", torch.zeros(3, 128)),
        ("cos", torch.zeros(3, 64, dtype=torch.float16)),
        ("sin", torch.zeros(3, 32)),
    ],
)
def test_rotary_inputs_that_do_not_fit_are_refused_by_name(argument, bad):
    rotary = {"query": torch.zeros(3, 4, 64), "cos": torch.zeros(3, 64), "sin": torch.zeros(3, 64)}
    with pytest.raises(KernelInputError, match=f"rotate_write_kv: {argument} is .*; it must be "):
        rotate_write_kv(**good_inputs() | rotary | {argument: bad})


@pytest.mark.gpu
def test_writes_may_be_captured_in_a_graph(device):
    store = one_layer(torch.bfloat16, 2, 128, 16, 17, device)
    query = torch.randn(17, 4, 128, device=device).bfloat16()
    key, value = torch.randn(2, 17, 2, 128, device=device).bfloat16().unbind()
    cos, sin = cos_and_sin(17, 128, torch.bfloat16, device)
    slots = torch.full((17,), -1, device=device)
    arguments = (query, key, value, cos, sin, store[:, 1], slots)
    rotate_write_kv(*arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rotate_write_kv(*arguments)
    for tensor in (query, key, value):
        tensor.normal_()
    slots.copy_(some_slots(17, store, device))
    wanted, expected = query.clone(), store.clone()
    rotate_write_kv_ref(wanted, key, value, cos, sin, expected[:, 1], slots)
    graph.replay()
    assert torch.equal(query, wanted) and torch.equal(store, expected)


@pytest.mark.gpu
def test_slots_beyond_two_to_the_31_elements_are_reached(device):
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    store = torch.zeros(20_000, 8, 2, 16, 8, 128, dtype=torch.bfloat16, device=device)
    key, value = torch.randn(2, 2, 8, 128, device=device).bfloat16().unbind()
    write_kv(key, value, store[:, 7], torch.tensor([0, 20_000 * 16 - 1], device=device))
    assert torch.equal(store[-1, 7, 0, -1], key[1]) and torch.equal(store[-1, 7, 1, -1], value[1])
    assert store[-1, 7, :, :-1].abs().max() == 0
