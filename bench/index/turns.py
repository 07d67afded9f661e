"""One turn of a conversation, by the length of its history: with a cursor, and with the whole prompt in a buffer.

20 conversations of that length take 10 turns each, in turn; a turn brings 32 new tokens. One turn is everything the
index does for it: append, acquire, extend, commit, release.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from bench.common import percentiles, save
from bench.index.clock import CLOCKS, overhead_us
from bench.index.index import INDEXES
from bench.index.show import Table
from bench.index.worker import ask
from bench.index.workloads import PAGE, Request, random_tokens

CONVERSATIONS, TURNS, NEW = 20, 10, 32
HISTORIES = (1_000, 3_000, 10_000, 30_000, 100_000, 200_000)
COLUMNS = {
    "case": "one turn, history, form",
    "turn_us_p50": "turn us p50",
    "turn_us_p99": "p99",
    "lookup_us_p50": "lookup p50",
    "insert_us_p50": "insert p50",
}


def run(options: argparse.Namespace) -> None:
    """Measure each length in both forms."""
    rows = []
    shown = Table(COLUMNS, 28)
    for form in ("cursor", "tokens"):
        for num_tokens in HISTORIES:
            row = ask("turns", num_tokens=num_tokens, form=form, clock=options.clock, seed=options.seed)
            rows.append({"case": f"{num_tokens:,} tokens, {form}", "history_tokens": num_tokens, "form": form, **row})
            shown.add(rows[-1])
    save("index_turns", rows, options.seed)


def measure(num_tokens: int, form: str, clock_name: str, seed: int) -> dict[str, Any]:
    """Turns after histories of `num_tokens`."""
    clock = CLOCKS[clock_name]
    rng = np.random.default_rng(seed)
    longest = num_tokens + TURNS * NEW
    index = INDEXES[form].make(CONVERSATIONS * (longest + PAGE), CONVERSATIONS)
    tokens = [random_tokens(rng, longest) for _ in range(CONVERSATIONS)]
    for session, history in enumerate(tokens):
        index.lookup(index.prepare(Request(history[:num_tokens], session)))
        index.insert()
    lookup, insert, turn = [], [], []
    for end in range(num_tokens + NEW, longest + 1, NEW):
        for session, history in enumerate(tokens):
            given = index.prepare(Request(history[:end], session, end - NEW))
            start = clock()
            hit = index.lookup(given)
            found = clock()
            index.insert()
            done = clock()
            assert end - NEW - PAGE < hit <= end - NEW, "the history is cached"
            lookup.append((found - start) / 1e3)
            insert.append((done - found) / 1e3)
            turn.append((done - start) / 1e3)
    index.check()
    whole = percentiles(turn)
    return {
        "turn_us_p50": whole["p50"],
        "turn_us_p99": whole["p99"],
        "lookup_us_p50": percentiles(lookup)["p50"],
        "insert_us_p50": percentiles(insert)["p50"],
        "clock": clock_name,
        "clock_us": overhead_us(clock),
    }
