"""Prometheus' text form, read as Prometheus' own library reads it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from radixkv_client import BadAnswer, parse_metrics
from radixkv_client import Histogram as Observed

BOUNDS = (0.1, 1.0, 10.0)


def exposed(label, sizes):
    registry = CollectorRegistry()
    Counter("radixkv:things", "Things.", ("name",), registry=registry).labels(label).inc(len(sizes))
    Gauge("level", "A level.", registry=registry).set(-2.5e-7)
    times = Histogram("radixkv:times_seconds", "Times.", ("name",), buckets=BOUNDS, registry=registry)
    for size in sizes:
        times.labels(label).observe(size)
    return generate_latest(registry).decode()


@given(st.text(st.characters(codec="utf-8"), max_size=12), st.lists(st.floats(0, 100), max_size=12))
def test_every_sample_is_the_one_prometheus_reads(label, sizes):
    text = exposed(label, sizes)
    metrics = parse_metrics(text)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            mine = [one for one in metrics.samples(sample.name) if one.labels == sample.labels]
            assert [one.value for one in mine] == [sample.value]


def test_a_total_sums_over_labels_and_can_be_narrowed():
    metrics = parse_metrics('a{x="1",y="p"} 2\na{x="2",y="p"} 3\n')
    assert metrics.total("a") == 5
    assert metrics.total("a", x="2", y="p") == 3
    assert metrics.total("b") == 0
    assert "a" in metrics
    assert "b" not in metrics


@pytest.mark.parametrize("line", ["<html>", "a{x=1 2", "a b", "1a 2"])
def test_what_is_no_metric_is_refused(line):
    with pytest.raises(BadAnswer, match="cannot be read"):
        parse_metrics(f"ok 1\n{line}\n")


@given(st.lists(st.floats(0, 9.9), min_size=1, max_size=30), st.floats(0.01, 1))
def test_a_quantile_lies_in_the_bucket_of_the_observation_it_estimates(sizes, share):
    times = parse_metrics(exposed("x", sizes)).histogram("radixkv:times_seconds")
    exact = sorted(sizes)[max(math.ceil(share * len(sizes) - 1e-9) - 1, 0)]
    high = next(bound for bound in BOUNDS if exact <= bound)
    low = max((bound for bound in (0.0, *BOUNDS) if bound < high), default=0.0)
    assert low <= times.quantile(share) <= high


def test_quantiles_of_nothing_are_none_and_of_the_unbounded_the_last_bound():
    assert Observed((), ()).quantile(0.5) is None
    assert Observed((1.0, math.inf), (0.0, 0.0)).quantile(0.5) is None
    assert Observed((1.0, math.inf), (0.0, 3.0)).quantile(0.5) == 1.0


@given(st.lists(st.floats(0, 100), max_size=9), st.lists(st.floats(0, 100), max_size=9))
def test_what_was_observed_since_is_what_came_after(before, after):
    def read(sizes):
        return parse_metrics(exposed("x", sizes)).histogram("radixkv:times_seconds")

    old, new = read(before), read(before + after)
    if before and after:
        assert new.since(old) == read(after)
    assert new.since(new).count == 0


def test_a_server_that_began_anew_counts_from_nothing():
    new = Observed((1.0, math.inf), (1.0, 2.0))
    assert new.since(Observed((1.0, math.inf), (5.0, 5.0))) == new
    assert new.since(Observed((), ())) == new
