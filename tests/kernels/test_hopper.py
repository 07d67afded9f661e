"""The Hopper kernel answers as float64 does, twice the same, whatever unused memory holds; and says what it cannot do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from radixkv_kernels import hopper
from radixkv_kernels.attention import TILES, attend, attend_ref
from radixkv_kernels.device_plan import DevicePlan, upload
from radixkv_kernels.planning import Geometry, Plan, Span, plan

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # of a row's norm


@pytest.fixture
def on_hopper(device) -> torch.device:
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")
    return device


@dataclass(frozen=True)
class Given:
    """What attention is given.

    Attributes:
        kv: [P, 2, S, H, D], the middle of three layers; NaN wherever no request has a token: in pages that are nobody's,
            and in the last page of each request, beyond its end.
    """

    query: torch.Tensor
    kv: torch.Tensor
    spans: list[Span]
    geometry: Geometry
    work: Plan
    ready: DevicePlan

    @property
    def scale(self) -> float:
        return float(self.geometry.head_dim**-0.5)

    def answer(self, **options) -> torch.Tensor:
        out = torch.full_like(self.query, math.nan)
        return attend(self.query, self.kv, self.ready, scale=self.scale, out=out, **options)

    def supported(self, **changed) -> bool:
        options = {"query": self.query, "kv": self.kv, "plan": self.ready} | changed
        return hopper.supports(**options)


def make(device, dtype, geometry, contexts, *, shared=0):
    """Requests with (tokens before, new tokens) each, over scattered pages; the first `shared` pages are those of all."""
    torch.manual_seed(0)
    size = geometry.page_size
    counts = [-(-(position + new) // size) for position, new in contexts]
    num_pages = shared + sum(count - shared for count in counts) + 9
    order = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    common, order = order[:shared], order[shared:]
    store = torch.full(
        (num_pages, 3, 2, size, geometry.num_kv_heads, geometry.head_dim), math.nan, dtype=dtype, device=device
    )
    spans = []
    for (position, new), count in zip(contexts, counts, strict=True):
        own, order = order[: count - shared], order[count - shared :]
        spans.append(Span(np.concatenate([common, own]), position, new))
    for span in spans:
        slots = torch.from_numpy(span.pages.repeat(size) * size + np.tile(np.arange(size), len(span.pages)))[: span.end]
        slots = slots.long().to(device)
        content = torch.randn(span.end, 3, 2, *store.shape[4:], device=device).to(dtype)
        store[slots // size, :, :, slots % size] = content
    query = torch.randn(sum(new for _, new in contexts), geometry.num_heads, geometry.head_dim, device=device).to(dtype)
    work = plan(spans, geometry)
    return Given(query, store[:, 1], spans, geometry, work, upload(work, geometry, device))


def check(given):
    """Two calls give the same bits, and each row is as near to float64 as its dtype allows."""
    assert given.supported()
    assert len(given.work.wide) > 0
    wanted = attend_ref(given.query.double(), given.kv.double(), given.spans, scale=given.scale)
    first, again = given.answer(), given.answer()  # the second finds barriers and partial results as the first left them
    error = (first.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(error.max()) < TOLERANCE[given.query.dtype] * 2, error.flatten().topk(3)
    assert torch.equal(first, again)


# few shapes, as a kernel is compiled for each
CASES = {
    "a whole tile": (torch.bfloat16, (8, 2, 128, 16), 4, [(0, 32)]),
    "parts of tiles": (torch.bfloat16, (8, 2, 128, 16), 4, [(0, 300), (128, 128), (100, 65), (1000, 33)]),
    "split over the context": (torch.bfloat16, (8, 2, 128, 16), 132, [(3000, 33), (2000, 64), (5000, 100), (7, 40)]),
    "7 heads share": (torch.bfloat16, (7, 1, 128, 16), 8, [(900, 64), (0, 77), (1, 19)]),
    "no heads share": (torch.float16, (2, 2, 64, 16), 8, [(900, 164), (0, 277), (1, 19)]),
    "heads of 64, pages of 64": (torch.float16, (8, 2, 64, 64), 16, [(900, 164), (0, 277), (63, 65), (2000, 40)]),
    "pages of 128": (torch.bfloat16, (4, 1, 128, 128), 16, [(900, 164), (0, 277), (130, 65), (4000, 40)]),
    "pages of 8": (torch.bfloat16, (4, 1, 128, 8), 16, [(900, 164), (0, 277), (63, 65), (3000, 40)]),
    "beside decoding": (torch.bfloat16, (8, 2, 128, 16), 16, [(700, 1), (0, 90), (33, 2), (500, 60), (1, 1)]),
    "fewer programs than work": (torch.bfloat16, (8, 2, 128, 16), 1, [(300, 64), (0, 200), (100, 129)]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_prefill_equals_float64(on_hopper, name):
    dtype, shape, processors, contexts = CASES[name]
    given = make(on_hopper, dtype, Geometry(*shape, num_processors=processors), contexts)
    assert given.work.num_slots > 0 or name != "split over the context"
    check(given)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 17, 63, 64, 65, 123, 127, 128, 129, 255, 257])
def test_prefill_of_any_length_equals_float64(on_hopper, length):
    geometry = Geometry(8, 2, 128, 16, num_processors=8)
    check(make(on_hopper, torch.bfloat16, geometry, [(0, max(length, 5)), (length, 40)]))


@pytest.mark.gpu
def test_a_prefix_that_many_share_equals_float64(on_hopper):
    geometry = Geometry(8, 2, 128, 16, num_processors=16, least_saving=256)
    given = make(on_hopper, torch.bfloat16, geometry, [(1600 + 37 * i, 1) for i in range(20)], shared=100)
    assert len(given.work.rows) > len(given.work.positions), "shared"
    check(given)


@pytest.mark.gpu
def test_the_portable_kernel_agrees(on_hopper):
    dtype, shape, processors, contexts = CASES["split over the context"]
    given = make(on_hopper, dtype, Geometry(*shape, num_processors=processors), contexts)
    assert torch.allclose(given.answer().float(), given.answer(tiles=TILES).float(), atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["decoding beside prefill", "a shared prefix"])
def test_a_graph_in_which_both_widths_run_gives_the_eager_bits_each_time(on_hopper, name):
    geometry = Geometry(8, 2, 128, 16, num_processors=16, least_saving=256)
    if name == "a shared prefix":
        given = make(on_hopper, torch.bfloat16, geometry, [(1600 + 37 * i, 1) for i in range(20)], shared=100)
    else:
        given = make(on_hopper, torch.bfloat16, geometry, [(700, 1), (3000, 90), (33, 2), (500, 60), (5000, 1)])
    assert given.supported() and len(given.work.narrow) > 0 and len(given.work.wide) > 0
    eager, out = given.answer(), torch.empty_like(given.query)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(given.query, given.kv, given.ready, scale=given.scale, out=out)
    for _ in range(2):
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, eager)


@pytest.mark.gpu
def test_what_it_cannot_do_it_says(on_hopper):
    contexts = [(100, 40)]
    given = make(on_hopper, torch.bfloat16, Geometry(8, 2, 128, 16), contexts)
    assert given.supported()
    assert not given.supported(window=64)
    assert not given.supported(soft_cap=30.0)
    assert not given.supported(sinks=torch.zeros(8, device=on_hopper))
    assert not given.supported(query=given.query.float(), kv=given.kv.float())
    assert not given.supported(kv=given.kv.transpose(2, 3)), "heads of a token that are not adjacent"
    for geometry in (Geometry(4, 1, 80, 16), Geometry(4, 1, 128, 4), Geometry(4, 1, 128, 16, wide=64)):
        assert not make(on_hopper, torch.bfloat16, geometry, contexts).supported()


def test_off_a_gpu_it_says_no(device):
    if device.type == "cuda":
        pytest.skip("there is a GPU")
    assert not make(device, torch.bfloat16, Geometry(4, 1, 128, 16), [(10, 20)]).supported()
