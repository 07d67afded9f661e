"""Memory a page and time an operation, from 1,000 sessions (10,000 pages) to 100,000 sessions (a million pages).

A session is 160 tokens of its own after 512 shared ones, sent in two turns. Then, at each size, sessions are picked at
random: looked up with 32 new tokens, inserted, and after that pages are evicted eight at a time and put back. Every
size has a process and a cache of its own, just large enough.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from bench.common import RESULTS, percentiles, save
from bench.index.clock import CLOCKS, overhead_us
from bench.index.index import INDEXES
from bench.index.memory import resident_bytes
from bench.index.radix import RadixIndex
from bench.index.show import Table
from bench.index.worker import ask
from bench.index.workloads import PAGE, Request, random_tokens, tokens_of

SESSIONS = (1_000, 3_000, 10_000, 30_000, 100_000)
SHARED, OWN, NEW, OPERATIONS, EVICTED = 512, 160, 32, 2_000, 8
Times = dict[str, list[float]]
COLUMNS = {
    "case": "scale, sessions",
    "num_pages": "pages",
    "bytes_per_page": "B a page",
    "bytes_per_token": "B a token",
    "lookup_us_p50": "lookup us p50",
    "lookup_us_p99": "p99",
    "insert_us_p50": "insert us p50",
    "insert_us_p99": "p99",
    "evict_us_p50": "evict us p50",
    "evict_us_p99": "p99",
}


def run(options: argparse.Namespace) -> None:
    """Measure each size, and draw."""
    rows = []
    shown = Table(COLUMNS, 16)
    for num_sessions in SESSIONS[:3] if options.quick else SESSIONS:
        row = ask("scale", num_sessions=num_sessions, clock=options.clock, seed=options.seed)
        rows.append({"case": f"{num_sessions:,}", "num_sessions": num_sessions, **row})
        shown.add(rows[-1])
    save("index_scale", rows, options.seed)
    if not options.quick:
        draw(rows)


def measure(num_sessions: int, clock_name: str, seed: int) -> dict[str, Any]:
    """One size."""
    rng = np.random.default_rng(seed)
    shared = random_tokens(rng, SHARED)
    headroom = OPERATIONS * (NEW + PAGE)
    INDEXES["tokens"].warm_up()
    before = resident_bytes()
    index = RadixIndex(SHARED + num_sessions * OWN + headroom, 0, "Tokens")
    for end in (OWN // 2, OWN):
        for session in range(num_sessions):
            index.lookup(index.prepare(_request(shared, session, end)))
            index.insert()
    grown, num_pages = resident_bytes() - before, index.num_cached() // PAGE
    picked = rng.integers(0, num_sessions, OPERATIONS).tolist()
    times = _operate(index, [_request(shared, session, OWN) for session in picked], rng, clock_name)
    index.check()
    row: dict[str, Any] = {
        "num_pages": num_pages,
        "bytes_per_page": grown / num_pages,
        "bytes_per_token": grown / num_pages / PAGE,
    }
    for name, samples in times.items():
        found = percentiles(samples)
        row |= {f"{name}_us_p50": found["p50"], f"{name}_us_p99": found["p99"]}
    return row | {"clock": clock_name, "clock_us": overhead_us(CLOCKS[clock_name])}


def _request(shared: np.ndarray, session: int, num_tokens: int) -> Request:
    return Request(np.concatenate([shared, tokens_of([session], OWN)[:num_tokens]]), session)


def _operate(index: RadixIndex, requests: list[Request], rng: np.random.Generator, clock_name: str) -> Times:
    """Microseconds of each look-up and insert, and then of each eviction."""
    clock = CLOCKS[clock_name]
    times: Times = {"lookup": [], "insert": [], "evict": []}
    for request in requests:
        given = index.prepare(Request(np.concatenate([request.prompt, random_tokens(rng, NEW)])))
        start = clock()
        hit = index.lookup(given)
        found = clock()
        index.insert()
        done = clock()
        assert hit >= len(request.prompt)
        times["lookup"].append((found - start) / 1e3)
        times["insert"].append((done - found) / 1e3)
    for request in requests[: OPERATIONS // 10]:
        start = clock()
        freed = index.evict(EVICTED * PAGE)
        times["evict"].append((clock() - start) / 1e3)
        assert freed == EVICTED * PAGE
        again = np.concatenate([request.prompt, random_tokens(rng, freed)])
        index.lookup(index.prepare(Request(again)))
        index.insert()
    return times


def draw(rows: list[dict[str, Any]]) -> None:
    """bench/results/index_scale.png: memory a page on the left, time an operation on the right."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    pages = [row["num_pages"] for row in rows]
    figure, (memory, times) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    memory.plot(pages, [row["bytes_per_page"] for row in rows], marker="o", color="#0072b2")
    memory.set(xscale="log", xlabel="pages of 16 tokens", ylabel="bytes a page", title="Resident memory")
    for name, colour in (("lookup", "#0072b2"), ("insert", "#d55e00"), ("evict", "#009e73")):
        times.plot(pages, [row[f"{name}_us_p50"] for row in rows], marker="o", color=colour, label=f"{name}, p50")
        times.plot(pages, [row[f"{name}_us_p99"] for row in rows], linestyle=":", color=colour, label=f"{name}, p99")
    times.set(xscale="log", xlabel="pages of 16 tokens", ylabel="microseconds", title="One operation")
    times.legend(fontsize=8)
    for axes in (memory, times):
        axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
        axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "index_scale.png", dpi=90)
