"""Every eviction policy on recorded traces, beside LRU and the optimum. `python -m bench.eviction [TRACE ...]`.

Each trace is replayed through the real PrefixCache at each capacity (percent of its distinct pages) under each policy, and
under `auto` with a one-bit tag a request, "this session will be continued", right 70, 80, 90 and 100 times in a hundred.

    page hit rate %, gap closed %    a cell: what was hit, and where that lies between LRU (0) and the optimum (100)
    pressure                         mean gap closed where LRU hits at most 0.9 of the optimum; negative: worse than LRU
    worst                            points of hit rate, against LRU, at the capacity where it does worst
    requests/s                       of the whole replay, CPU time, median over the capacities

Without traces, those of tests/data/traces. A minute or two for each trace.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench.common import save, table
from radixkv.policies import POLICIES
from radixkv.replay.curve import lru_curve
from radixkv.replay.optimum import optimum
from radixkv.replay.reuse import Reuse
from radixkv.replay.rows import Row
from radixkv.replay.simulate import simulate
from radixkv.replay.workload import Workload

DATA = Path(__file__).parent.parent.parent / "tests/data/traces"
PERCENTS = (1, 2, 5, 10, 20, 30, 50)
ACCURACIES = (0.7, 0.8, 0.9, 1.0)
PRESSURE = 0.9


def main() -> None:
    """Replay, print a table for each trace, save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, default=sorted(DATA.glob("*.jsonl.gz")))
    parser.add_argument("--percents", type=int, nargs="+", default=PERCENTS)
    parser.add_argument("--policies", nargs="+", default=sorted(POLICIES), choices=sorted(POLICIES))
    parser.add_argument("--accuracies", type=float, nargs="*", default=ACCURACIES, help="of auto's tags")
    parser.add_argument("--limit", type=int, help="requests of each trace")
    parser.add_argument("--seed", type=int, default=0, help="which tags are wrong")
    parser.add_argument("--dry", action="store_true", help="print only")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for path in options.traces:
        with Workload.load([path], limit=options.limit) as workload:
            mine = list(measure(workload, path.name.split(".")[0], options))
        print_table(mine)
        rows += mine
    if not options.dry:
        save("eviction", rows, options.seed)


def measure(workload: Workload, trace: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each capacity and policy."""
    reuse = Reuse.of(workload)
    curve = lru_curve(workload, reuse)
    tags = {accuracy: reuse.hints(workload.lengths, accuracy, options.seed) for accuracy in options.accuracies}
    for percent in options.percents:
        pages = workload.num_pages * percent // 100
        best, lru = optimum(workload, reuse, pages), curve.page_hit_rate(pages)

        def shown(name: str, row: Row, percent: int = percent, best: Row = best, lru: float = lru) -> dict[str, Any]:
            gap = best.page_hit_rate - lru
            return {
                "trace": trace,
                "percent": percent,
                "pages": row.capacity_pages,
                "policy": name,
                "page_hit_rate": row.page_hit_rate,
                "token_hit_rate": row.token_hit_rate,
                "points_over_lru": 100 * (row.page_hit_rate - lru),
                "gap_closed": (row.page_hit_rate - lru) / gap if gap else None,
                "pressure": lru <= PRESSURE * best.page_hit_rate,
                "evicted_pages": row.evicted_pages,
                "requests_per_s": row.requests_per_s,
            }

        yield shown("min", best)
        for policy in options.policies:
            yield shown(policy, simulate(workload, policy, pages))
        for accuracy, bits in tags.items():
            yield shown(f"auto, tag {accuracy:.0%}", simulate(workload, "auto", pages, tags=bits.__getitem__))


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """One trace's rows, a line for each policy."""
    percents = list(dict.fromkeys(row["percent"] for row in rows))
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        mine = {row["percent"]: row for row in rows if row["policy"] == policy}
        line: dict[str, Any] = {"policy": policy}
        for percent, row in mine.items():
            closed = row["gap_closed"]
            line[f"{percent}%"] = f"{100 * row['page_hit_rate']:.2f}" + ("" if closed is None else f" ({100 * closed:+.0f})")
        pressed = [row["gap_closed"] for row in mine.values() if row["pressure"]]
        line["pressure"] = f"{100 * fmean(pressed):+.1f}" if pressed else None
        line["worst"] = f"{min(row['points_over_lru'] for row in mine.values()):+.2f}"
        line["requests/s"] = f"{median(row['requests_per_s'] for row in mine.values()):,.0f}" if policy != "min" else None
        lines.append(line)
    print(f"\n{rows[0]['trace']}: page hit rate % (gap closed %)")
    print(table(lines, ["policy", *(f"{percent}%" for percent in percents), "pressure", "worst", "requests/s"]), flush=True)


if __name__ == "__main__":
    main()
