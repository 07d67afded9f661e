"""One call that frees 128 tokens, by the number of leaves it chooses from.

Every leaf is a sequence of 32 tokens (two pages) after one prefix of 128, so a call takes four of them. Between two
calls, untimed, the four that went are replaced by new ones and 16 others are looked up: the order that an index keeps
its leaves in has gone stale again, as in use.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.common import percentiles, save
from bench.index.clock import CLOCKS, overhead_us
from bench.index.index import Index, Made
from bench.index.memory import resident_bytes
from bench.index.show import Table
from bench.index.worker import ask
from bench.index.workloads import Request, random_tokens, tokens_of

PREFIX, LEAF, FREED, CALLS, TOUCHED = 128, 32, 128, 200, 16
LEAVES = (1_000, 10_000, 100_000, 1_000_000)
COLUMNS = {
    "case": "one evict call, leaves",
    "evict_us_p50": "us p50",
    "evict_us_p99": "p99",
    "first_us": "first call us",
    "freed_tokens": "tokens freed",
    "bytes_per_leaf": "B a leaf",
}


def run(options: argparse.Namespace) -> None:
    """Measure our index at each size."""
    rows = []
    shown = Table(COLUMNS, 24)
    for num_leaves in LEAVES[:-1] if options.quick else LEAVES:
        row = ask("evictions", index="tokens", num_leaves=num_leaves, clock=options.clock, seed=options.seed)
        rows.append({"case": f"{num_leaves:,}", "num_leaves": num_leaves, **row})
        shown.add(rows[-1])
    save("index_evictions", rows, options.seed)


def measure(made: Made, num_leaves: int, clock_name: str, seed: int) -> dict[str, Any]:
    """Fill an index with so many leaves, and evict from it."""
    clock = CLOCKS[clock_name]
    rng = np.random.default_rng(seed)
    prefix = random_tokens(rng, PREFIX)
    made.warm_up()
    before = resident_bytes()
    index = made.make(PREFIX + (num_leaves + 64) * LEAF)
    _fill(index, prefix, range(num_leaves))
    grown = resident_bytes() - before
    samples, freed, made_leaves = [], 0, num_leaves
    for _ in range(CALLS + 1):
        start = clock()
        taken = index.evict(FREED)
        samples.append((clock() - start) / 1e3)
        freed += taken
        new = range(made_leaves, made_leaves + taken // LEAF)
        _fill(index, prefix, new)
        made_leaves = new.stop
        _fill(index, prefix, rng.integers(made_leaves - num_leaves // 2, made_leaves, TOUCHED).tolist())
    found = percentiles(samples[1:])
    return {
        "evict_us_p50": found["p50"],
        "evict_us_p99": found["p99"],
        "first_us": samples[0],
        "freed_tokens": freed / (CALLS + 1),
        "bytes_per_leaf": grown / num_leaves,
        "clock": clock_name,
        "clock_us": overhead_us(clock),
    }


def _fill(index: Index, prefix: np.ndarray, leaves: Sequence[int]) -> None:
    """Look up and insert each leaf's sequence; a leaf that is there is touched."""
    for first in range(0, len(leaves), 1000):
        some = leaves[first : first + 1000]
        for own in tokens_of(some, LEAF).reshape(-1, LEAF):
            index.lookup(index.prepare(Request(np.concatenate([prefix, own]))))
            index.compute()
            index.insert()
