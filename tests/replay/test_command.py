from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
import typer
from typer.testing import CliRunner

from radixkv.errors import RadixKVError
from radixkv.policies import POLICIES
from radixkv.replay.cli import replay
from tests.replay.traces import DATA, HEADER, mooncake, qwen, random_paths, write

app = typer.Typer()
app.command()(replay)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def trace(tmp_path):
    paths = [path for path in random_paths(4, num_requests=80) if path]
    return write(tmp_path / "small <trace>.jsonl", [mooncake(path, 10 * i) for i, path in enumerate(paths)])


def test_the_command_prints_json_alone_on_stdout():
    trace = DATA / "synthetic_trace.jsonl.gz"
    command = [sys.executable, "-m", "radixkv.replay", str(trace), "--capacity", "1%,10%", "-c", "2007p", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert report["complete"] is True
    assert report["trace"]["requests"] == 3993
    assert report["trace"]["footprint_pages"] == 40148
    assert report["cost"]["model"] == "llama-3.1-8b"
    rows = {(row["policy"], row["capacity_pages"]): row for row in report["rows"]}
    rates = {key: round(100 * row["page_hit_rate"], 2) for key, row in rows.items()}
    assert rates == {
        ("lru", 401): 3.70,
        ("min", 401): 15.33,
        ("lru", 4014): 25.73,
        ("min", 4014): 50.91,
        ("lru", 2007): 15.50,
        ("min", 2007): 38.71,
    }
    row = rows["lru", 4014]
    assert row["token_hit_rate"] == pytest.approx(row["page_hit_rate"] * 0.986, rel=1e-3)
    assert row["capacity_bytes"] == 4014 * 512 * 131072
    assert (row["gap_closed"], rows["min", 4014]["gap_closed"]) == (0, 1)
    assert 0.25 < row["flops_saved_share"] < 0.28
    assert row["gpu_hours_saved"] == pytest.approx(row["flops_saved"] / (989.4e12 * 0.5) / 3600)
    assert row["requests_per_s"] > 0
    curve = report["lru_curve"]
    assert curve[-1]["capacity_pages"] == 40148
    assert [one["page_hit_rate"] for one in curve] == sorted(one["page_hit_rate"] for one in curve)


def test_a_bad_trace_is_one_line_on_stderr_and_a_failure(tmp_path):
    bad = write(tmp_path / "bad.jsonl", [mooncake([1]), mooncake([-1])])
    done = subprocess.run([sys.executable, "-m", "radixkv.replay", str(bad)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: {bad}, line 2, field hash_ids[0]: expected 0 to {2**256}, got -1\n"


def test_the_table_names_every_row(trace):
    done = run(trace, "-c", "50%,3p", "--policy", "lru", "--policy", "min", "--page-size", 256)
    assert done.exit_code == 0, done.output
    assert len(re.findall(r"│ (50%|3p) .* (lru|min) ", done.stdout)) == 4
    assert "distinct pages of 256 tokens" in done.stdout


def test_several_formats_are_replayed_together(trace, tmp_path):
    small = write(tmp_path / "qwen", [qwen(1, list(range(40)), time_s=0.1), qwen(2, list(range(50)), parent=1, time_s=0.2)])
    delta = write(tmp_path / "delta", [HEADER, [0, 1024, 1, -1, 0, 2], [300, 1536, 1, 0, 2, 1]])
    done = run(trace, small, delta, "-c", "100%", "--page-size", 16, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    alone = json.loads(run(trace, "-c", "100%", "--page-size", 16, "--json").stdout)
    extra = report["rows"][0]["hit_pages"] - alone["rows"][0]["hit_pages"]
    assert extra == 40 + 2 * 32
    assert report["trace"]["requests"] == alone["trace"]["requests"] + 4


def test_limit_check_and_share_are_options(trace):
    report = json.loads(run(trace, trace, "--share", "--limit", 10, "--check-every", 1, "-c", "9p", "--json").stdout)
    assert report["trace"]["requests"] == 10
    shared = json.loads(run(trace, trace, "--share", "-c", "9p", "--json").stdout)["trace"]["footprint_pages"]
    apart = json.loads(run(trace, trace, "-c", "9p", "--json").stdout)["trace"]["footprint_pages"]
    assert apart == 2 * shared


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "lru,nonsense"], f"one of {', '.join([*sorted(POLICIES), 'min'])}"),
        (["-c", "5 apples"], "capacity='5 apples'"),
        (["--model", "gpt"], "llama-3.1-8b"),
        (["--gpu", "abacus"], "h100"),
        (["--page-size", "100"], "a divisor or a multiple of 512"),
        (["--html", "/nowhere/at/all.html"], "a folder that exists"),
        (["--utilisation", "2"], "utilisation"),
    ],
)
def test_a_wrong_option_says_what_would_be_right(trace, arguments, message):
    done = run(trace, *arguments)
    assert isinstance(done.exception, RadixKVError)
    assert message in str(done.exception)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "link", "img", "iframe"):
            self.found.append(tag)
        self.found += [name for name, _ in attrs if name in ("src", "href", "xlink:href", "onload")]


def test_the_html_report_stands_alone(trace, tmp_path):
    out = tmp_path / "out.html"
    assert run(trace, "-c", "10%,50%,90%", "--html", out).exit_code == 0
    text = out.read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert links.found == []
    assert "small &lt;trace&gt;.jsonl" in text and "<trace>" not in text
    svg = ET.fromstring(re.search(r"<svg.*</svg>", text, re.DOTALL)[0])
    ns = "{http://www.w3.org/2000/svg}"
    titles = [title.text for title in svg.iter(f"{ns}title")]
    assert len(titles) == 6, "a hover text for each of 2 policies x 3 capacities"
    assert titles[0].startswith("lru at 10%: ") and "GPU-hours" in titles[0]
    assert len(list(svg.iter(f"{ns}polyline"))) == 2, "the exact curve and min"
    for line in svg.iter(f"{ns}polyline"):
        for point in line.get("points").split():
            x, y = map(float, point.split(","))
            assert 60 <= x <= 730.1 and 19.9 <= y <= 388.1, "inside the axes"
    assert text.count("<tr>") == 7


def test_a_plot_without_matplotlib_names_the_extra(trace, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("radixkv.replay.plot.import_module", missing)
    done = run(trace, "--plot", tmp_path / "out.png")
    assert "pip install 'radixkv[plot]'" in str(done.exception)


def test_a_plot_is_a_png(trace, tmp_path):
    pytest.importorskip("matplotlib")
    assert run(trace, "-c", "10%,50%", "--plot", tmp_path / "out.png").exit_code == 0
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_ctrl_c_reports_what_is_done(trace, monkeypatch):
    from radixkv.replay.simulate import simulate

    calls: list[int] = []

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return simulate(*args, **more)

    monkeypatch.setattr("radixkv.replay.cli.simulate", interrupted)
    done = run(trace, "-c", "10%,20%,30%,40%", "--policy", "lru", "--json")
    assert done.exit_code == 130
    report = json.loads(done.stdout)
    assert report["complete"] is False
    assert [row["capacity"] for row in report["rows"]] == ["10%", "20%"]
    assert "interrupted" in done.stderr


def test_the_documented_library_use_runs(monkeypatch):
    monkeypatch.chdir(DATA.parent.parent.parent)
    text = (DATA.parent.parent.parent / "docs/replay.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/replay.md", "exec"), {})
