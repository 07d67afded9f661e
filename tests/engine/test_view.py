"""Working views hold what the pages hold, and are handed out again only where that is still so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from radixkv.engine.view import ViewPool, WorkingView
from radixkv.store.device import DeviceStore, PageShape


@pytest.fixture(params=[1, 4, 16])
def store(request):
    store = DeviceStore(PageShape(2, request.param, 3, 8, torch.float32), 64, torch.device("cpu"))
    store.kv.normal_(generator=torch.Generator().manual_seed(0))
    return store


def tokens_of(store, pages):
    """[L, 2, H, n * S, D], the slow and plain way."""
    return torch.cat([store.kv[page].permute(0, 1, 3, 2, 4) for page in pages], dim=3)


@pytest.mark.parametrize(("start", "end"), [(0, 0), (0, 1), (0, 48), (5, 6), (3, 47), (16, 32), (17, 33), (31, 32), (2, 3)])
def test_load_copies_exactly_the_tokens_asked_for(store, start, end):
    pages = np.random.default_rng(0).permutation(64)[: -(-48 // store.shape.page_size)].tolist()
    view = WorkingView(torch.full((2, 2, 3, 64, 8), 7.0))
    view.load(store, pages, start, end)
    assert torch.equal(view.kv[:, :, :, start:end], tokens_of(store, pages)[:, :, :, start:end])
    assert (view.kv[:, :, :, :start] == 7).all()
    assert (view.kv[:, :, :, end:] == 7).all()


@pytest.mark.parametrize(("first", "count"), [(0, 0), (0, 3), (1, 1), (2, 2)])
def test_save_then_load_gives_the_same_bytes(store, first, count):
    size = store.shape.page_size
    view = WorkingView(torch.randn(2, 2, 3, 64, 8, generator=torch.Generator().manual_seed(1)))
    before = store.kv.clone()
    pages = [9, 3, 40, 11][:count]
    view.save(store, pages, first)
    other = WorkingView(torch.zeros(2, 2, 3, 64, 8))
    other.load(store, [0] * first + pages, first * size, (first + count) * size)
    span = slice(first * size, (first + count) * size)
    assert torch.equal(other.kv[:, :, :, span], view.kv[:, :, :, span])
    untouched = [page for page in range(64) if page not in pages]
    assert torch.equal(store.kv[untouched], before[untouched])


def origin(*rows):
    return np.array(rows, np.int64).reshape(-1, 2)


def test_a_view_is_handed_out_again_for_the_pages_it_still_holds(store):
    pool = ViewPool(store, max_idle_tokens=40960)
    first, held = pool.take(100)
    assert held == 0
    pool.give(first, origin((5, 0), (6, 0), (7, 0)))
    other, _ = pool.take(5000)
    same, held = pool.take(100, origin((5, 0), (6, 0), (9, 0)))
    assert same is first
    assert held == 2
    pool.give(same, origin((5, 0), (6, 0)))
    assert pool.take(100, origin((5, 1), (6, 0)))[1] == 0, "page 5 was freed since: its generation moved"
    assert other is not first


def test_idle_views_stay_within_their_budget(store):
    pool = ViewPool(store, max_idle_tokens=2500)
    views = [pool.take(256)[0] for _ in range(4)]
    for view in views:
        pool.give(view)
    assert pool.take(1)[0] is views[2]
    assert pool.take(1)[0] is views[3]
    assert pool.take(1)[0] not in views
