"""`auto` against the targets of the policy study (eviction.md), on the traces that are here."""

from __future__ import annotations

import json
from statistics import fmean

import pytest
import typer
from typer.testing import CliRunner

from radixkv.cache import PrefixCache
from radixkv.errors import ConfigError
from radixkv.replay.cli import replay
from radixkv.replay.curve import lru_curve
from radixkv.replay.optimum import optimum
from radixkv.replay.reuse import Reuse
from radixkv.replay.simulate import simulate
from radixkv.replay.workload import Workload
from tests.replay.traces import DATA, mooncake, random_paths, requests_of, write

PRESSURE = 0.9  # of the optimum: where LRU reaches less, a policy can matter
LOSS = 0.0025  # of the pages asked for, at most


@pytest.fixture(scope="module")
def traces():
    opened = {name: Workload.load([DATA / f"{name}_trace.jsonl.gz"]) for name in ("conversation", "synthetic")}
    yield {name: (workload, Reuse.of(workload)) for name, workload in opened.items()}
    for workload in opened.values():
        workload.close()


def measured(workload, reuse, percent, tags=None):
    """By how much `auto` is above LRU, and the share of the gap to the optimum; None where there is no pressure."""
    pages = workload.num_pages * percent // 100
    lru = lru_curve(workload, reuse).page_hit_rate(pages)
    best = optimum(workload, reuse, pages).page_hit_rate
    auto = simulate(workload, "auto", pages, tags=tags).page_hit_rate
    return auto - lru, (auto - lru) / (best - lru) if lru <= PRESSURE * best else None


def test_without_hints_it_closes_15_percent_of_the_gap_under_pressure_on_conversation(traces):
    rows = [measured(*traces["conversation"], percent) for percent in (1, 2, 5, 10)]
    assert fmean(closed for _, closed in rows) >= 0.15
    assert min(gain for gain, _ in rows) >= 0


@pytest.mark.parametrize(("name", "percents"), [("conversation", (30,)), ("synthetic", (1, 2, 5, 10, 20, 30, 50))])
def test_it_is_never_a_quarter_of_a_point_under_lru(traces, name, percents):
    for percent in percents:
        gain, _ = measured(*traces[name], percent)
        assert gain >= -LOSS, f"{percent} %"


def test_with_a_bit_that_is_right_nine_times_in_ten_it_closes_45_percent_on_conversation(traces):
    workload, reuse = traces["conversation"]
    tags = reuse.hints(workload.lengths, 0.9, seed=0)
    assert fmean(measured(workload, reuse, percent, tags.__getitem__)[1] for percent in (1, 2, 5, 10)) >= 0.45


def test_hints_are_right_as_often_as_asked(traces):
    workload, reuse = traces["synthetic"]
    truth = reuse.continued(workload.lengths)
    for accuracy in (0.0, 0.7, 1.0):
        right = (truth == reuse.hints(workload.lengths, accuracy, seed=3)).mean()
        assert right == pytest.approx(accuracy, abs=0.03)
    assert reuse.hints(workload.lengths, 0.7, seed=3) == reuse.hints(workload.lengths, 0.7, seed=3)


def test_the_command_replays_with_tags(tmp_path):
    paths = [path for path in random_paths(4, num_requests=900, depth=8) if path]
    trace = write(tmp_path / "small.jsonl", [mooncake(path, 1000 * i) for i, path in enumerate(paths)])
    app = typer.Typer()
    app.command()(replay)
    command = [str(trace), "-c", "9p", "-p", "auto", "--tag-accuracy", "0.8", "--tag-seed", "5", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    with Workload.load([trace]) as workload:
        tags = Reuse.of(workload).hints(workload.lengths, 0.8, seed=5)
        row = simulate(workload, "auto", 9, tags=tags.__getitem__)
    assert report["tag_accuracy"] == 0.8
    assert report["rows"][0]["hit_pages"] == row.hit_pages
    assert CliRunner().invoke(app, [*command, "--tag-accuracy", "1.5"]).exit_code == 2


def test_an_accuracy_that_is_no_probability_is_refused(traces):
    workload, reuse = traces["synthetic"]
    with pytest.raises(ConfigError, match="tag_accuracy"):
        reuse.hints(workload.lengths, 1.5, seed=0)


def test_a_request_is_used_at_its_time_in_the_trace(monkeypatch):
    seen: list[float] = []

    def timed(*args, clock, **more):
        return PrefixCache(*args, clock=lambda: seen.append(clock()) or seen[-1], **more)

    monkeypatch.setattr("radixkv.replay.simulate.PrefixCache", timed)
    with Workload.of(requests_of([[0, 1], [0, 2], [0, 1, 3]])) as workload:
        assert workload.times.tolist() == [0.0, 1.0, 2.0]
        simulate(workload, "auto", 8)
    assert sorted(set(seen)) == [0.0, 1.0, 2.0]
