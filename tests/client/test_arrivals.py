"""The load generator sends what the trace says: same prefixes, same order, made smaller; and its clock's parts add up."""

from __future__ import annotations

import gzip
from itertools import combinations, islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.serve.arrivals import TRACE, at_rate, draw
from bench.serve.spans import Span, attribute
from radixkv.replay.formats import read_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """The beginning of the real one, which is long."""
    path = tmp_path_factory.mktemp("trace") / "head.jsonl"
    with gzip.open(TRACE, "rt", encoding="utf-8") as whole:
        path.write_text("".join(islice(whole, 800)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def arrivals(trace):
    return draw(trace, 30, 32, 8192, seed=2)


def test_the_same_seed_draws_the_same_requests(trace, arrivals):
    assert draw(trace, 30, 32, 8192, seed=2) == arrivals
    assert draw(trace, 30, 32, 8192, seed=3) != arrivals


def test_lengths_are_those_of_the_trace_divided(trace, arrivals):
    sizes = {(one.num_input_tokens // 32, max(one.num_output_tokens // 32, 1)) for one in read_trace(trace)}
    assert len(arrivals) == 30
    assert all((len(one.prompt), one.max_tokens) in sizes for one in arrivals)


def test_what_is_said_to_be_shared_is_what_prompts_share_with_earlier_ones(arrivals):
    best = [0] * len(arrivals)
    for (_, earlier), (index, later) in combinations(enumerate(arrivals), 2):
        best[index] = max(best[index], common(earlier.prompt, later.prompt))
    assert [one.shared_tokens for one in arrivals] == [
        min(n, len(one.prompt) - 1) // 16 * 16 for n, one in zip(best, arrivals, strict=True)
    ]


def common(one, other):
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_gaps_are_stretched_by_one_factor_to_the_rate(arrivals):
    due = at_rate(arrivals, 2.0)
    assert len(due) / due[-1].at_s == pytest.approx(2.0)
    factor = due[-1].at_s / arrivals[-1].at_s
    for (a, b), (c, d) in zip(pairwise(arrivals), pairwise(due), strict=True):
        assert d.at_s - c.at_s == pytest.approx((b.at_s - a.at_s) * factor)


def test_a_scale_that_cuts_blocks_is_refused(trace):
    with pytest.raises(ValueError, match="divide"):
        draw(trace, 3, 7, 8192, seed=0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-5, 15), st.floats(0, 5)), max_size=8))
def test_the_parts_of_a_time_add_up_to_it(calls):
    spans = [Span(stage, start, start + length) for stage, start, length in calls]
    parts = attribute(spans, 0.0, 10.0, lambda before, after: f"{before}>{after}")
    assert sum(parts.values()) == pytest.approx(10.0)
    assert all(seconds > 0 for seconds in parts.values())


def test_an_instant_belongs_to_the_call_that_began_last():
    spans = [Span("outer", 1.0, 8.0), Span("inner", 2.0, 4.0), Span("inner", 9.0, 20.0)]
    parts = attribute(spans, 0.0, 10.0, lambda before, after: f"{before}>{after}")
    assert parts == {">outer": 1.0, "outer": 5.0, "inner": 3.0, "outer>inner": 1.0}
