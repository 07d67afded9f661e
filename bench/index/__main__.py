"""The index alone, no model: what a look-up and an insert cost, per prompt. `python -m bench.index [PART ...]`.

parts
  workloads   six seeded workloads (--only picks some), by the form tokens are given in
  evictions   one call that frees 128 tokens, by the number of leaves
  turns       one turn of a conversation by the length of its history, with a cursor and without
  scale       memory a page and time an operation up to a million pages and 100,000 sessions; draws a plot

workloads
  a chat  b 100k-token document  c repository of 64 files  d fan-out of 50,000  e a, in 25 % of its memory
  f conversation trace, in 3 million tokens

phases
  lookup      acquire: key building, longest match, lock; with a cursor, appending the new tokens as well
  insert      extend, commit and release: pages reserved, the whole prompt published, the lock dropped
  memcmp      one compare of each whole prompt with a hot copy of it: the ceiling

forms
  Tokens      checked once by the caller, nothing to convert; int32 array: numpy, checked and copied in the look-up
  list[int]   converted in the look-up; cursor: the new tokens only

Each measurement has a process of its own. Namespaces, events, leases and matches inside pages are on. Memory is
resident memory with the index full less that before it was made, over the tokens cached. Times are CPU times of the
process unless --clock wall; reading the clock is in them (its cost is in the rows).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

from bench.common import save
from bench.index import evictions, scale, turns
from bench.index.clock import CLOCKS
from bench.index.index import INDEXES
from bench.index.show import Table
from bench.index.worker import ask
from bench.index.workloads import WORKLOADS, make

CURSOR_WORKLOADS = "ae"
COLUMNS = {
    "case": "workload, form",
    "requests": "requests",
    "hit_rate": "hit %",
    "lookup_us_p50": "lookup us p50",
    "lookup_us_p99": "p99",
    "insert_us_p50": "insert us p50",
    "insert_us_p99": "p99",
    "mean_us": "mean us a request",
    "memcmp_us_p50": "memcmp us p50",
    "bytes_per_token": "B a token",
}


def main() -> None:
    """Run the parts that were asked for."""
    options = _options()
    parts: dict[str, Callable[[argparse.Namespace], None]] = {
        "workloads": run_workloads,
        "evictions": evictions.run,
        "turns": turns.run,
        "scale": scale.run,
    }
    for part in options.parts or parts:
        start = time.perf_counter()
        parts[part](options)
        print(f"-- {part}: {time.perf_counter() - start:.0f} s\n", flush=True)


def run_workloads(options: argparse.Namespace) -> None:
    """Every workload in every form; the first form's hits are checked against the judge, the others' against its."""
    rows: list[dict[str, Any]] = []
    shown = Table(COLUMNS, 36)
    for name in options.only:
        workload = make(name, options.seed, quick=options.quick)
        given = {"name": name, "seed": options.seed, "quick": options.quick}
        floor = ask("ceiling", clock=options.clock, **given)
        for form in options.forms:
            if form == "cursor" and name not in CURSOR_WORKLOADS:
                continue
            judged = form == options.forms[0] and not workload.evicts
            row = ask("workload", index=form, clock=options.clock, passes=options.passes, judged=judged, **given)
            row |= {"memcmp_us_p50": floor["lookup_us_p50"], "memcmp_us_p99": floor["lookup_us_p99"]}
            row["hit_rate"] = 100 * row["hit_tokens"] / row["tokens"]
            case = {"case": f"{name} {workload.title}, {INDEXES[form].form}", "workload": name, "form": form}
            rows.append({**case, "capacity_tokens": workload.capacity_tokens, "quick": options.quick, **row})
            shown.add(rows[-1])
        hits = {row["hits_crc"] for row in rows if row["workload"] == name}
        assert len(hits) <= 1, f"every form must find the same prefixes in workload {name}"
    save("index_workloads", rows, options.seed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="workloads, evictions, turns, scale; all by default")
    parser.add_argument("--only", default="".join(WORKLOADS), help="letters of the workloads to run, such as ae")
    parser.add_argument("--forms", default=",".join(INDEXES), help="forms to run, of tokens,array,list,cursor")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="CPU time of the process, or wall time")
    parser.add_argument("--passes", type=int, default=2, help="timed passes over each workload, after one to warm up")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests: to try things out, not to publish")
    parser.add_argument("--seed", type=int, default=0, help="of every workload")
    options = parser.parse_args()
    options.forms = options.forms.split(",")
    _refuse(parser, "part", options.parts, ("workloads", "evictions", "turns", "scale"))
    _refuse(parser, "workload", options.only, WORKLOADS)
    _refuse(parser, "form", options.forms, INDEXES)
    return options


def _refuse(parser: argparse.ArgumentParser, what: str, given: Iterable[str], known: Iterable[str]) -> None:
    for one in given:
        if one not in known:
            parser.error(f"there is no {what} {one!r}; there are {', '.join(known)}")


if __name__ == "__main__":
    main()
