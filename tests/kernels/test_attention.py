"""Paged attention answers as float64 does, for every shape, width, window, cap and sink; and writes nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from radixkv_kernels.attention import TILES, attend, attend_ref
from radixkv_kernels.device_plan import Capacity, DevicePlan, PlanTooLarge, pack, upload
from radixkv_kernels.planning import Geometry, Span, plan

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.fixture
def dtype(device) -> torch.dtype:
    """The most exact one where it costs nothing. On a GPU fp32 kernels compile for long: there, few tests ask for them."""
    return torch.float16 if device.type == "cuda" else torch.float32


def make(seed, device, dtype, geometry, num_pages, contexts, *, layers=1):
    """A poisoned page store with random content, and spans over scattered pages: (kv of one layer, query, spans)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    shape = (num_pages, layers, 2, geometry.page_size, geometry.num_kv_heads, geometry.head_dim)
    store = torch.randn(shape, device=device).to(dtype)
    order = rng.permutation(num_pages).astype(np.int32)
    spans, taken = [], 0
    for position, num_tokens in contexts:
        count = -(-(position + num_tokens) // geometry.page_size)
        spans.append(Span(order[taken : taken + count], position, num_tokens))
        taken += count
    unused = torch.from_numpy(order[taken:].astype(np.int64)).to(device)
    store[unused] = math.nan  # whoever reads a page that is nobody's spoils its answer
    rows = sum(span.num_tokens for span in spans)
    query = torch.randn(rows, geometry.num_heads, geometry.head_dim, device=device).to(dtype)
    return store[:, layers // 2], query, spans


def check(query, kv, spans, geometry, *, share=True, window=None, sinks=None, soft_cap=None):
    work = plan(spans, geometry, window=window, share=share)
    out = torch.full_like(query, math.nan)
    options = {"scale": geometry.head_dim**-0.5, "window": window, "soft_cap": soft_cap}
    # tiles are given so that the portable kernel runs everywhere; test_hopper.py has the other
    attend(query, kv, upload(work, geometry, query.device), sinks=sinks, out=out, tiles=TILES, **options)
    sinks = None if sinks is None else sinks.double()
    wanted = attend_ref(query.double(), kv.double(), spans, sinks=sinks, **options)
    error = float((out.double() - wanted).norm() / wanted.norm())
    assert error < TOLERANCE[query.dtype], error
    return out, work


SHAPES = [(4, 4, 64, 1), (8, 2, 80, 4), (3, 1, 96, 16), (9, 3, 64, 16), (2, 2, 128, 64), (2, 1, 256, 8), (7, 1, 32, 2)]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.bfloat16, shape) for shape in SHAPES]
    + [(torch.float16, shape) for shape in SHAPES[1:5:3]]
    + [(torch.float32, shape) for shape in SHAPES[::5]],
    ids=str,
)
def test_mixed_batches_equal_float64(device, dtype, shape):
    if device.type == "cuda" and dtype == torch.float32 and shape[2] > 128:
        pytest.skip("compiles for minutes")
    geometry = Geometry(*shape, num_processors=2)
    dim, page = shape[2:]
    contexts = [(0, 1), (0, 17), (122, 1), (200, 1), (37, 40), (1, 2)]
    kv, query, spans = make(dim + page, device, dtype, geometry, 600 // page + 30, contexts, layers=3)
    check(query, kv, spans, geometry)


@pytest.mark.parametrize("length", [1, 17, 63, 64, 65, 123, 500])
@pytest.mark.parametrize("num_processors", [1, 40])
def test_decode_split_over_the_context_equals_float64(device, dtype, length, num_processors):
    geometry = Geometry(4, 2, 64, 16, num_processors=num_processors)
    kv, query, spans = make(length, device, dtype, geometry, 80, [(length - 1, 1), (300, 1)])
    _, work = check(query, kv, spans, geometry)
    assert (work.num_slots > 0) == (num_processors == 40)


@pytest.mark.parametrize(("position", "num_tokens"), [(0, 1), (0, 70), (5, 64), (100, 33), (512, 16)])
def test_prefill_on_a_cached_prefix_equals_float64(device, dtype, position, num_tokens):
    geometry = Geometry(4, 1, 64, 4, num_processors=1)
    kv, query, spans = make(position, device, dtype, geometry, 150, [(position, num_tokens)])
    check(query, kv, spans, geometry)


@pytest.mark.parametrize("window", [1, 7, 64, 10_000])
def test_a_sliding_window_hides_what_lies_before_it(device, dtype, window):
    geometry = Geometry(4, 2, 64, 4, num_processors=8)
    kv, query, spans = make(window, device, dtype, geometry, 250, [(300, 1), (0, 90), (150, 60), (20, 1)])
    check(query, kv, spans, geometry, window=window)


def test_a_soft_cap_bounds_the_scores(device, dtype):
    geometry = Geometry(4, 2, 64, 4, num_processors=8)
    kv, query, spans = make(1, device, dtype, geometry, 250, [(300, 1), (0, 90)])
    check(query * 20, kv, spans, geometry, soft_cap=5.0)


@pytest.mark.parametrize("num_processors", [1, 8])
def test_sinks_take_their_share(device, dtype, num_processors):
    geometry = Geometry(4, 2, 64, 4, num_processors=num_processors)
    kv, query, spans = make(1, device, dtype, geometry, 250, [(300, 1), (0, 90)])
    check(query, kv, spans, geometry, sinks=torch.tensor([0.5, 3.0, -2.0, 8.0], device=device))


def shared_spans(rng, num_pages, page, paths):
    """Spans whose page tables begin alike: `paths` are tuples of (name of a run, its pages); equal names are shared."""
    order, runs, taken = rng.permutation(num_pages).astype(np.int32), {}, 0
    spans = []
    for path in paths:
        pages = []
        for name, count in path:
            if name not in runs:
                runs[name] = order[taken : taken + count]
                taken += count
            pages.append(runs[name])
        joined = np.concatenate(pages)
        spans.append(Span(joined, len(joined) * page - int(rng.integers(1, page + 1)), 1))
    return spans


TREE = [
    (("system", 80), ("a", 70), (f"own {i}", 3)) if i < 5 else (("system", 80), (f"own {i}", 2 + i % 3)) for i in range(9)
] + [(("alone", 30),)]


def test_a_prefix_that_requests_share_is_read_once_for_all(device, dtype):
    geometry = Geometry(4, 1, 64, 8, wide=64, num_processors=8, least_saving=256)
    spans = shared_spans(np.random.default_rng(0), 400, 8, TREE)
    kv = torch.randn(400, 2, 8, 1, 64, device=device).to(dtype)
    query = torch.randn(len(spans), 4, 64, device=device).to(dtype)
    shared, work = check(query, kv, spans, geometry, share=True)
    alone, plain = check(query, kv, spans, geometry, share=False)
    assert float((shared - alone).norm() / alone.norm()) < TOLERANCE[dtype]

    def keys_read(work):
        return sum(int((items[:, 4] - items[:, 3]).sum()) for items in (work.narrow, work.wide))

    least = 8 * sum(count for _, count in dict(run for path in TREE for run in path).items())
    assert keys_read(plain) == sum(span.end for span in spans)
    assert least - 8 * 20 <= keys_read(work) <= least, "all 9 are one wide or two narrow tiles"
    assert len(work.wide) > 0, "nine requests are too many rows for a narrow tile"


def test_the_same_plan_gives_the_same_bits(device):
    geometry = Geometry(4, 1, 64, 8, wide=64, num_processors=8, least_saving=256)
    spans = shared_spans(np.random.default_rng(0), 400, 8, TREE)
    kv = torch.randn(400, 2, 8, 1, 64, device=device).to(torch.bfloat16)
    query = torch.randn(len(spans), 4, 64, device=device).to(torch.bfloat16)
    first, _ = check(query, kv, spans, geometry)
    again, _ = check(query, kv, spans, geometry)
    assert torch.equal(first, again)


def test_a_plan_in_larger_buffers_answers_the_same_and_leaves_rows_beyond_it_alone(device, dtype):
    geometry = Geometry(4, 2, 64, 4, num_processors=8)
    kv, query, spans = make(3, device, dtype, geometry, 250, [(300, 1), (0, 20)])
    work = plan(spans, geometry)
    wanted = attend(query, kv, upload(work, geometry, device), scale=0.1)
    capacity = Capacity.for_rows(32, geometry, max_pages=500)
    host = torch.full((capacity.num_ints,), -7, dtype=torch.int32)
    used = pack(work, capacity, host.numpy())
    assert used < capacity.num_ints
    padded = torch.randn(32, 4, 64, device=device).to(dtype)
    padded[:21] = query
    out = torch.full_like(padded, math.nan)
    attend(padded, kv, DevicePlan.over(host.to(device), capacity, geometry), scale=0.1, out=out)
    assert torch.equal(out[:21], wanted)
    assert out[21:].isnan().all()


def test_a_plan_that_does_not_fit_says_so():
    geometry = Geometry(4, 2, 64, 4)
    work = plan([Span(np.arange(100, dtype=np.int32), 399, 1)], geometry)
    capacity = Capacity.for_rows(4, geometry, max_pages=99)
    with pytest.raises(PlanTooLarge, match="100 pages"):
        pack(work, capacity, np.zeros(capacity.num_ints, np.int32))


def test_strided_queries_are_read_in_place(device, dtype):
    geometry = Geometry(4, 2, 64, 4, num_processors=2)
    kv, query, spans = make(3, device, dtype, geometry, 250, [(40, 1), (0, 20)])
    transposed = query.transpose(0, 1).contiguous().transpose(0, 1)  # as a model hands it over: [1, Hq, N, D]
    assert not transposed.is_contiguous()
    check(transposed, kv, spans, geometry)


@pytest.mark.parametrize(
    "wrong",
    [
        {"query": torch.zeros(1, 3, 64)},
        {"kv": torch.zeros(9, 2, 8, 2, 64)},
        {"scale": 0.0},
        {"query": torch.zeros(1, 4, 64, dtype=torch.float16)},
    ],
)
def test_what_does_not_fit_together_is_refused(device, wrong):
    geometry = Geometry(4, 2, 64, 4)
    work = upload(plan([Span(np.arange(3, dtype=np.int32), 10, 1)], geometry), geometry, "cpu")
    given = {"query": torch.zeros(1, 4, 64), "kv": torch.zeros(9, 2, 4, 2, 64), "scale": 1.0} | wrong
    with pytest.raises(ValueError, match=r"fit a plan|above 0|must be the same"):
        attend(given["query"], given["kv"], work, scale=given["scale"])


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"query": torch.zeros(2, 4, 64)}, "query has 2 rows, and the plan is for 3"),
        ({"out": torch.zeros(4, 4, 64)}, r"out must be as query, \(3, 4, 64\)"),
        ({"out": torch.zeros(3, 4, 64, dtype=torch.float16)}, "out must be as query"),
        ({"out": torch.zeros(3, 64, 4).transpose(1, 2)}, "out must be as query"),
        ({"sinks": torch.zeros(8)[::2]}, r"sinks must be \[4\], contiguous"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[4\], contiguous"),
    ],
)
def test_too_few_rows_and_an_output_or_sinks_that_do_not_fit_are_refused(wrong, text):
    geometry = Geometry(4, 2, 64, 4)
    work = upload(plan([Span(np.arange(3, dtype=np.int32), 8, 3)], geometry), geometry, "cpu")
    given = {"query": torch.zeros(3, 4, 64), "kv": torch.zeros(9, 2, 4, 2, 64), "plan": work} | wrong
    with pytest.raises(ValueError, match=text):
        attend(**given, scale=1.0)
