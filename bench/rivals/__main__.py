"""radixkv's index beside its peers', on the same prompts: `make bench-rivals`, or `python -m bench.rivals`.

  sglang-rust    SGLang's default tree, page size 1        vllm     KVCacheManager, sha256, blocks of 16
  sglang-python  SGLang's tree in Python, page size 1      dynamo   its KV indexer, blocks of 16; it never evicts

Each is installed from its PyPI wheel into an environment of its own (bench/rivals/requirements.txt) and measured at its
own defaults, in the token form its engine holds, in a process of its own; radixkv is measured beside it, given a
`Tokens` buffer and a list[int]. Before anything is timed, every request's hit tokens are compared with what must hit,
found by other means than a tree (bench/index/judge.py): exactly, at each index's own page size, where nothing is
evicted. Under eviction (e, f) no request may hit more than that, and totals may differ from radixkv's by 5 %: what
goes first differs by policy details. What each phase covers stands in the module of each rival; docs/rivals.md has
what is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.common import save
from bench.index import evictions
from bench.index.clock import CLOCKS
from bench.index.index import INDEXES
from bench.index.show import Table
from bench.index.worker import ROOT, WorkerError, ask
from bench.index.workloads import WORKLOADS, Workload, make
from bench.rivals.indexes import ABSENT, EVICTING, RIVALS

OURS = ("tokens", "list")
TOLERANCE = 0.05  # of hit tokens, where policies differ
LEAVES = (1_000, 10_000, 100_000)
COLUMNS = {
    "case": "workload, index",
    "hit_rate": "hit %",
    "lookup_us_p50": "lookup us p50",
    "lookup_us_p99": "p99",
    "insert_us_p50": "insert us p50",
    "insert_us_p99": "p99",
    "mean_us": "mean us a request",
    "times_ours": "times ours",
    "bytes_per_token": "B a token",
}


def main() -> None:
    """Measure everyone, workload by workload."""
    options = _options()
    for name, reason in ABSENT.items():
        print(f"{name}: not measured: {reason}")
    rows = _workloads(options)
    save("index_rivals", [*rows, *({"case": name, "error": reason} for name, reason in ABSENT.items())], options.seed)
    if not options.quick:
        save("index_rivals_evictions", _evictions(options), options.seed)


def _workloads(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    shown = Table(COLUMNS, 44)
    for name in options.only:
        workload = make(name, options.seed, quick=options.quick)
        ours: dict[str, Any] | None = None
        for index in (*OURS, *options.rivals):
            row = _measure(name, index, options)
            row = {"case": _case(workload, index), "workload": name, "index": index, **row}
            if "error" in row:
                print(f"{row['case']}: not measured: {row['error']}", flush=True)
                rows.append(row)
                continue
            row["hit_rate"] = 100 * row["hit_tokens"] / row["tokens"]
            ours = ours or row
            row["times_ours"] = row["mean_us"] / ours["mean_us"]
            _compare(workload, row, ours)
            rows.append(row)
            shown.add(row)
    return rows


def _measure(name: str, index: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row, or why there is none."""
    given = {"name": name, "index": index, "seed": options.seed, "quick": options.quick, "clock": options.clock}
    try:
        return ask("workload", passes=options.passes, judged=True, **_python(index, options), **given)
    except WorkerError as error:
        return {"error": str(error)}


def _compare(workload: Workload, row: dict[str, Any], ours: dict[str, Any]) -> None:
    """Where all evict, hits agree within the tolerance; where none does, the judge has compared every request."""
    if not workload.evicts or (row["index"] in RIVALS and row["index"] not in EVICTING):
        return
    if abs(row["hit_tokens"] - ours["hit_tokens"]) > TOLERANCE * ours["hit_tokens"]:
        row["hits_differ"] = True
        print(f"{row['case']}: hits {row['hit_tokens']:,} tokens where radixkv hits {ours['hit_tokens']:,}", flush=True)


def _evictions(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    shown = Table(evictions.COLUMNS, 28)
    for index in ("tokens", *(name for name in options.rivals if EVICTING.get(name))):
        for num_leaves in LEAVES:
            try:
                row = ask(
                    "evictions",
                    index=index,
                    num_leaves=num_leaves,
                    clock=options.clock,
                    seed=options.seed,
                    **_python(index, options),
                )
            except WorkerError as error:
                row = {"error": str(error)}
                print(f"{index}, {num_leaves:,}: not measured: {error}")
            rows.append({"case": f"{_label(index)}, {num_leaves:,}", "index": index, "num_leaves": num_leaves, **row})
            shown.add(rows[-1])
    return rows


def _python(index: str, options: argparse.Namespace) -> dict[str, str]:
    return {"python": options.python} if index in RIVALS else {}


def _case(workload: Workload, index: str) -> str:
    return f"{workload.name} {workload.title}, {_label(index)}"


def _label(index: str) -> str:
    return index if index in RIVALS else f"radixkv {INDEXES[index].form}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.rivals", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="".join(WORKLOADS), help="letters of the workloads to run, such as ae")
    parser.add_argument("--rivals", default=",".join(RIVALS), help="which of them, separated by commas")
    parser.add_argument("--python", default=str(ROOT / ".venv-rivals/bin/python"), help="the rivals' interpreter")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="CPU time of the process, or wall time")
    parser.add_argument("--passes", type=int, default=1, help="timed passes over each workload, after one to warm up")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests, no evictions: to try things out")
    parser.add_argument("--seed", type=int, default=0, help="of every workload")
    options = parser.parse_args()
    options.rivals = options.rivals.split(",")
    for what, given, known in (("workload", options.only, WORKLOADS), ("rival", options.rivals, RIVALS)):
        for one in given:
            if one not in known:
                parser.error(f"there is no {what} {one!r}; there are {', '.join(known)}")
    if not Path(options.python).exists():
        parser.error(f"{options.python} does not exist: run `make bench-rivals`, which makes it")
    return options


if __name__ == "__main__":
    main()
