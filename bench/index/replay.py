"""A workload through an index: once to warm up and to weigh it, then timed.

Each phase of each request is one sample. A pass starts with a new index, so its first requests are misses. The first,
untimed pass gives hit tokens and memory: resident memory with the index full less that before it was made, in a
process that has done nothing else. Python's garbage collector stays on, as in a server.
"""

from __future__ import annotations

import gc
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from bench.common import percentiles
from bench.index.clock import CLOCKS, Clock, overhead_us
from bench.index.index import Index, Made
from bench.index.judge import expected_hits
from bench.index.memory import resident_bytes
from bench.index.workloads import Workload


@dataclass(slots=True)
class Samples:
    """Nanoseconds of every request's phases, in order."""

    lookup: array[int] = field(default_factory=lambda: array("q"))
    insert: array[int] = field(default_factory=lambda: array("q"))


def weigh(made: Made, workload: Workload, *, judged: bool) -> dict[str, Any]:
    """One pass; what it hit, and what the index weighs afterwards."""
    made.warm_up()
    before = resident_bytes()
    index = made.make(workload.capacity_tokens, workload.num_sessions)
    hits, num_tokens = array("i"), 0
    for request in workload.requests():
        hits.append(index.lookup(index.prepare(request)))
        index.compute()
        index.insert()
        num_tokens += len(request.prompt)
    cached, grown = index.num_cached(), resident_bytes() - before
    index.check()
    if judged:
        _judge(index, workload, hits)
    return {
        "requests": len(hits),
        "tokens": num_tokens,
        "hit_tokens": sum(hits),
        "hits_crc": zlib.crc32(hits),
        "cached_tokens": cached,
        "bytes_per_token": grown / cached,
    }


def _judge(index: Index, workload: Workload, hits: Sequence[int]) -> None:
    """Every request's hits are what they must be; where the index evicts, they are no more than that."""
    wanted = expected_hits(workload.requests(), index.page_size, exact=index.exact, keep_last=index.keep_last)
    for number, (one, other) in enumerate(zip(hits, wanted, strict=True)):
        if one > other or (one < other and not (workload.evicts and index.evicts)):
            raise AssertionError(f"workload {workload.name}: request {number} hit {one} tokens, not {other}")


def time_pass(made: Made, workload: Workload, clock: Clock) -> Samples:
    """One timed pass."""
    index = made.make(workload.capacity_tokens, workload.num_sessions)
    samples = Samples()
    gc.collect()
    for request in workload.requests():
        given = index.prepare(request)
        start = clock()
        index.lookup(given)
        found = clock()
        index.compute()
        computed = clock()
        index.insert()
        done = clock()
        samples.lookup.append(found - start)
        samples.insert.append(done - computed)
    return samples


def measure(made: Made, workload: Workload, clock_name: str, passes: int, *, judged: bool) -> dict[str, Any]:
    """The row of one index under one workload: hits compared with what they must be, then timed."""
    clock = CLOCKS[clock_name]
    row = weigh(made, workload, judged=judged)
    runs = [time_pass(made, workload, clock) for _ in range(passes)]
    for phase in ("lookup", "insert"):
        each = [getattr(run, phase) for run in runs]
        pooled = percentiles([sample / 1e3 for samples in each for sample in samples])
        row |= {f"{phase}_us_p50": pooled["p50"], f"{phase}_us_p99": pooled["p99"]}
        row[f"{phase}_us_p50_passes"] = [round(median(samples) / 1e3, 3) for samples in each]
    row["mean_us"] = fmean((sum(run.lookup) + sum(run.insert)) / len(run.lookup) for run in runs) / 1e3
    row["best_mean_us"] = min((sum(run.lookup) + sum(run.insert)) / len(run.lookup) for run in runs) / 1e3
    return row | {"clock": clock_name, "clock_us": overhead_us(clock), "passes": passes}


def ceiling(workload: Workload, clock_name: str) -> dict[str, Any]:
    """One memcmp of each prompt with a copy of it, both just made and so as hot as can be: no look-up is faster."""
    clock = CLOCKS[clock_name]
    samples = []
    for request in workload.requests():
        prompt = request.prompt.tobytes()
        stored = bytes(bytearray(prompt))
        start = clock()
        same = prompt.startswith(stored)
        samples.append((clock() - start) / 1e3)
        assert same
    found = percentiles(samples)
    return {
        "lookup_us_p50": found["p50"],
        "lookup_us_p99": found["p99"],
        "clock": clock_name,
        "clock_us": overhead_us(clock),
    }
