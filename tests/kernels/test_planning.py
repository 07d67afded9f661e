"""A plan covers what rows see, once, with the right pages, and no more: for every batch, shape, window and device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from radixkv_kernels.device_plan import Capacity, DevicePlan, pack
from radixkv_kernels.planning import CannotPlan, Geometry, Plan, Span, plan
from radixkv_kernels.sharing import find_shared

many = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Batch:
    """What is planned, and how."""

    spans: list[Span]
    geometry: Geometry
    window: int | None
    share: bool

    def plan(self, **changed) -> Plan:
        options = {"window": self.window, "share": self.share} | changed
        return plan(self.spans, self.geometry, **options)


ANY_WINDOW = st.sampled_from([None, None, None, None, 1, 7, 64, 300, 700])


@st.composite
def batches(draw, windows=ANY_WINDOW):
    """Requests on a tree of at most three levels, some of which decode, some prefill, on a device of some width."""
    page = draw(st.sampled_from([1, 2, 8, 16, 64, 128]))
    heads = draw(st.sampled_from([1, 2]))
    group = draw(st.sampled_from([1, 2, 4, 4, 7, 17]))
    geometry = Geometry(
        heads * group, heads, 64, page, wide=draw(st.sampled_from([32, 128])),
        num_processors=draw(st.sampled_from([1, 3, 132])), narrow_places=draw(st.integers(1, 3)), least_saving=256,
    )  # fmt: skip
    lengths = [draw(st.sampled_from([0, 520, 520, 700, 900])) for _ in range(3)]  # tokens of each level
    ids, nodes = np.random.default_rng(draw(st.integers(0, 3))).permutation(60_000).astype(np.int32), {}
    taken = 0
    spans = []
    for request in range(draw(st.sampled_from([0, 1, 4, 6, 8, 9, 10]))):
        path = (0, draw(st.sampled_from([0, 0, 1])), draw(st.sampled_from([0, 0, 1])), request)
        new = draw(st.sampled_from([1, 1, 1, 1, 1, 1, 2, 16, 130]))
        own_tokens = draw(st.sampled_from([0, 0, 5, 200]))  # where it has none, even its last page is another's too
        sizes = [*(-(-length // page) for length in lengths), -(-(new + own_tokens) // page) if own_tokens else 0]
        own = []
        for depth, size in enumerate(sizes):
            name = path[: depth + 1] if depth < 3 else request
            if name not in nodes:
                nodes[name] = ids[taken : taken + size]
                taken += size
            own.append(nodes[name])
        pages = np.concatenate(own)
        new = min(new, len(pages) * page)
        if new:
            spans.append(Span(pages, max(len(pages) * page - new - draw(st.integers(0, 2 * page)), 0), new))
    return Batch(spans, geometry, draw(windows), draw(st.sampled_from([True, True, True, False])))


def items_of(work: Plan):
    """(rows, first key, end, ordinal, page base) of every item."""
    for items in (work.narrow, work.wide):
        for first, count, base, begin, end, ordinal, *rest in items.tolist():
            assert rest == [0, 0]
            yield work.rows[first : first + count], begin, end, ordinal, base


def visible(batch: Batch) -> np.ndarray:
    """[N, keys] whether each row sees each key: the plainest statement of it."""
    longest = max((span.end for span in batch.spans), default=0)
    key, rows = np.arange(longest), []
    for span in batch.spans:
        for position in range(span.position, span.end):
            row = key <= position
            rows.append(row if batch.window is None else row & (key > position - batch.window))
    return np.array(rows, bool).reshape(len(rows), longest)


def span_of_rows(batch: Batch) -> list[int]:
    return [number for number, span in enumerate(batch.spans) for _ in range(span.num_tokens)]


def keys_read(work: Plan) -> int:
    return sum(end - begin for _, begin, end, _, _ in items_of(work))


def test_every_row_is_given_each_key_that_it_sees_exactly_once():
    situations = Counter()

    @settings(many, max_examples=130)
    @given(batches())
    def law(batch):
        work, wanted = batch.plan(), visible(batch)
        given_keys = np.zeros(wanted.shape, np.int64)
        for rows, begin, end, _, _ in items_of(work):
            assert len(set(rows.tolist())) == len(rows)
            given_keys[rows, begin:end] += 1
        assert (given_keys[wanted] == 1).all()
        assert given_keys.max(initial=0) <= 1, "a key that a row does not see may be in its items, but not twice"
        owner = span_of_rows(batch)
        users = [frozenset(owner[row] for row in rows.tolist()) for rows, *_ in items_of(work)]
        several = [rows for rows, *_ in items_of(work) if len({owner[row] for row in rows.tolist()}) > 1]
        situations["shared"] += bool(several)
        situations["nested"] += any(1 < len(inner) < len(outer) and inner < outer for inner in users for outer in users)
        situations["split"] += work.num_slots > 0
        situations["windowed"] += batch.window is not None and len(wanted) > 0 and not wanted[:, 0].all()
        situations["prefill"] += any(span.num_tokens > batch.geometry.narrow_rows for span in batch.spans)
        situations["both widths"] += len(work.narrow) > 0 and len(work.wide) > 0
        situations["shared by many"] += any(len(rows) > batch.geometry.narrow_rows for rows in several)
        situations["empty"] += not batch.spans

    law()
    names = ("shared", "nested", "split", "windowed", "prefill", "both widths", "shared by many", "empty")
    assert all(situations[name] >= 5 for name in names), situations


@many
@given(batches())
def test_an_item_lists_the_pages_of_all_its_rows(batch):
    work, owner, size = batch.plan(), span_of_rows(batch), batch.geometry.page_size
    for rows, begin, end, _, base in items_of(work):
        pages = np.arange(begin // size, (end - 1) // size + 1)
        assert base + pages[0] >= 0
        for number in {owner[row] for row in rows.tolist()}:
            assert np.array_equal(work.pages[base + pages], batch.spans[number].pages[pages])


@many
@given(batches())
def test_a_row_of_one_item_has_no_slot_and_others_have_one_for_each_item(batch):
    work = batch.plan()
    ordinals: list[list[int]] = [[] for _ in work.positions]
    for rows, _, _, ordinal, _ in items_of(work):
        for row in rows.tolist():
            ordinals[row].append(ordinal)
    slots = np.diff(work.slot_begin)
    for row, found in enumerate(ordinals):
        assert sorted(found) == ([-1] if slots[row] == 0 else list(range(slots[row])))
        assert slots[row] != 1, "a partial result with nothing to merge it with"


@many
@given(batches())
def test_every_key_of_an_item_is_seen_by_one_of_its_rows(batch):
    seen = visible(batch)
    for rows, begin, end, _, _ in items_of(batch.plan()):
        assert begin < end
        assert seen[rows, begin:end].any(0).all()


@many
@given(batches())
def test_an_item_fits_its_tile(batch):
    work, geometry = batch.plan(), batch.geometry
    assert (work.narrow[:, 1] <= geometry.narrow_rows).all()
    assert (work.wide[:, 1] <= geometry.wide_rows).all()
    if batch.window is None:
        for _, begin, _, _, _ in items_of(work):
            assert begin % min(geometry.page_size, 64) == 0, "a copy of so many tokens would cross a page's end"


@many
@given(batches())
def test_long_items_come_first(batch):
    work = batch.plan()
    for items in (work.narrow, work.wide):
        length = items[:, 4] - items[:, 3]
        assert (length[1:] <= np.minimum.accumulate(length)[:-1] + length.max(initial=0) / 16).all()


@many
@given(batches(windows=st.none()))
def test_sharing_never_reads_more(batch):
    shared, alone = batch.plan(share=True), batch.plan(share=False)
    assert keys_read(shared) <= keys_read(alone)
    if len(shared.rows) > len(shared.positions):
        assert keys_read(shared) < keys_read(alone)


@many
@given(batches())
def test_rows_and_positions_are_those_of_the_spans_in_order(batch):
    work = batch.plan()
    wanted = [position for span in batch.spans for position in range(span.position, span.end)]
    assert work.positions.tolist() == wanted
    assert work.rows[: len(wanted)].tolist() == list(range(len(wanted)))


@many
@given(batches(), st.integers(0, 9))
def test_a_plan_comes_out_of_its_buffer_as_it_went_in(batch, spare):
    work = batch.plan()
    needed = Capacity.of(work)
    capacity = Capacity(*(getattr(needed, name) + spare for name in Capacity.__dataclass_fields__))
    host = torch.full((capacity.num_ints,), -7, dtype=torch.int32)
    used = pack(work, capacity, host.numpy())
    host[used:] = -9  # what is not copied to a device is never read
    ready = DevicePlan.over(host, capacity, batch.geometry)
    assert ready.counts[:2].tolist() == [len(work.narrow), len(work.wide)]
    for name in ("positions", "narrow", "wide", "rows", "pages", "slot_begin"):
        wanted = getattr(work, name).ravel().tolist()
        assert getattr(ready, name)[: len(wanted)].tolist() == wanted
    beyond = ready.slot_begin[len(work.slot_begin) : capacity.num_rows + 1]
    assert (beyond == work.num_slots).all(), "rows beyond the plan's have no slots"


@many
@given(batches())
def test_the_same_batch_gives_the_same_plan(batch):
    first, again = batch.plan(), batch.plan()
    for name in ("positions", "narrow", "wide", "rows", "pages", "slot_begin"):
        assert np.array_equal(getattr(first, name), getattr(again, name))


def test_one_long_context_gives_all_processors_work():
    geometry = Geometry(32, 8, 128, 16)
    work = plan([Span(np.arange(2048, dtype=np.int32), 32_767, 1)], geometry)
    places = geometry.num_processors * geometry.narrow_places
    assert 0.9 * places <= len(work.narrow) * geometry.num_kv_heads <= places


@pytest.mark.parametrize(
    ("shape", "position", "num_tokens", "width", "most_idle"),
    [((28, 4, 128, 16), 32_768, 10, "wide", 68), ((8, 1, 128, 16), 33_790, 1, "narrow", 88)],
)
def test_a_long_context_is_cut_for_few_kv_heads_too(shape, position, num_tokens, width, most_idle):
    geometry = Geometry(*shape)
    work = plan([Span(np.arange(2200, dtype=np.int32), position, num_tokens)], geometry)
    items, other = (work.wide, work.narrow) if width == "wide" else (work.narrow, work.wide)
    places = geometry.num_processors * (geometry.wide_places if width == "wide" else geometry.narrow_places)
    assert len(other) == 0 and work.num_slots == len(items) * num_tokens
    assert places - most_idle <= len(items) * geometry.num_kv_heads <= places
    if width == "wide":
        assert len(items) == 16, "as many as a row may have"


def test_a_prefix_that_is_too_short_is_read_by_each():
    geometry, shared = Geometry(4, 1, 64, 16, least_saving=256), np.arange(1000, 1200, dtype=np.int32)
    for num_pages, runs in ((16, 0), (31, 0), (32, 1), (200, 1)):  # two who share save half of 512 tokens each
        tables = {i: np.append(shared[:num_pages], np.int32(i)) for i in range(2)}
        assert len(find_shared(tables, 2, 16, 256).runs) == runs
        work = plan([Span(pages, len(pages) * 16 - 1, 1) for pages in tables.values()], geometry)
        assert (len(work.rows) > 2) == (runs > 0)
        assert len(work.wide) == 0, "the rows of both fit a narrow tile"


def test_what_is_shared_is_a_tree():
    def table(*runs):
        return np.concatenate([np.arange(1000 * run, 1000 * run + count, dtype=np.int32) for run, count in runs])

    tables = {
        0: table((1, 40), (2, 70), (5, 3)),
        2: table((1, 40), (3, 50), (6, 1)),
        3: table((1, 40), (2, 70), (7, 9)),
        4: table((1, 40), (2, 70)),
        7: table((9, 500)),
    }
    found = find_shared(tables, 8, 16, 256)
    outer = next(number for number, run in enumerate(found.runs) if run.begin == 0)
    inner = next(number for number, run in enumerate(found.runs) if run.begin == 640)
    assert len(found.runs) == 2
    assert (sorted(found.runs[outer].members), found.runs[outer].end) == ([0, 2, 3, 4], 640)
    assert (sorted(found.runs[inner].members), found.runs[inner].end) == ([0, 3, 4], 110 * 16)
    assert found.runs[inner].parents == (outer,)
    assert found.begins.tolist() == [1760, 0, 640, 1760, 1760, 0, 0, 0]
    assert found.parents == {0: (outer, inner), 3: (outer, inner), 4: (outer, inner), 2: (outer,), 7: ()}


def test_a_plan_of_nothing_is_empty():
    work = plan([], Geometry(4, 2, 64, 16))
    assert work.num_slots == len(work.positions) == len(work.narrow) == len(work.wide) == len(work.pages) == 0
    assert work.slot_begin.tolist() == [0]


@pytest.mark.parametrize(("position", "num_tokens"), [(0, 0), (3, -1), (-1, 2), (30, 3), (32, 1)])
def test_a_span_without_tokens_or_pages_is_refused(position, num_tokens):
    good, bad = Span(np.arange(2, dtype=np.int32), 31, 1), Span(np.arange(2, dtype=np.int32), position, num_tokens)
    with pytest.raises(CannotPlan, match=r"span 1 is .* with 2 pages of 16; it must be") as caught:
        plan([good, bad], Geometry(4, 2, 64, 16))
    assert caught.value.what == "span 1"


def test_a_window_of_nothing_is_refused():
    with pytest.raises(CannotPlan, match="window is 0"):
        plan([], Geometry(4, 2, 64, 16), window=0)


@pytest.mark.parametrize(
    ("shape", "what"),
    [((4, 3, 64, 16), "num_heads"), ((4, 0, 64, 16), "num_heads"), ((4, 2, 64, 24), "page_size"),
     ((4, 2, 64, 0), "page_size"), ((129, 1, 64, 16), "num_heads / num_kv_heads")],
)  # fmt: skip
def test_a_shape_that_no_tile_takes_is_refused(shape, what):
    with pytest.raises(CannotPlan) as caught:
        Geometry(*shape)
    assert caught.value.what == what
    assert isinstance(caught.value, ValueError)
