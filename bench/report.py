"""Write the tables of the README, docs/replay.md and docs/gpu.md from bench/results: `python -m bench.report`.

A table stands between `<!-- bench:NAME -->` and `<!-- end -->`; it shows the newest rows of NAME.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.common import RESULTS

README = Path(__file__).parent.parent / "README.md"
REPLAY = README.parent / "docs/replay.md"
GPU = README.parent / "docs/gpu.md"
PAGES = (README, REPLAY, GPU)

COLUMNS = {
    "engine_chat": {
        "engine": "chat, 3 sessions x 6 turns",
        "wall_s": "wall s",
        "ttft_cold_ms": "first token, cold ms",
        "ttft_warm_ms": "warm ms",
        "decode_tok_s": "decode tokens/s",
        "computed_tokens": "prompt tokens computed",
    },
    "engine_repository": {
        "engine": "repository, 5 questions on 6,000 tokens",
        "wall_s": "wall s",
        "ttft_cold_s": "first token, cold s",
        "ttft_warm_ms": "warm ms",
        "decode_tok_s": "decode tokens/s",
        "computed_tokens": "prompt tokens computed",
    },
    "serve_load": {
        "cache": "server under an open load, prefix cache",
        "hit_rate": "hit rate",
        "ttft_p50_s": "first token p50 s",
        "ttft_p99_s": "p99 s",
        "gap_p50_ms": "between tokens p50 ms",
        "gap_p99_ms": "p99 ms",
        "goodput_per_s": "good requests/s",
        "failed": "failed",
    },
    "engine_gpu": {
        "workload": "Llama-3.1-8B's shape, bf16",
        "wall_s": "wall s",
        "vllm_wall_s": "vLLM's",
        "wall_goal_s": "goal",
        "warm_round_s": "warm round s",
        "vllm_warm_s": "vLLM's",
        "warm_goal_s": "goal",
        "ttft_p50_s": "first token p50 s",
        "out_tok_s": "tokens/s",
        "hit_rate": "hit rate",
    },
    "engine_gpu_single": {
        "workload": "one request, 32,000 tokens and 64 new",
        "hit_ms": "first token on a hit, ms",
        "vllm_hit_ms": "vLLM's",
        "hit_goal_ms": "goal",
        "cold_s": "without, s",
        "vllm_cold_s": "vLLM's",
        "cold_goal_s": "goal",
    },
    "kernels_attention": {
        "case": "attention of one layer, pages of 16",
        "ours_ms": "ms",
        "rate": "rate",
        "% of floor": "% of the floor",
        "target_ms": "goal ms",
        "plain_ms": "not grouped ms",
        "sdpa_ms": "torch SDPA, contiguous ms",
    },
    "kernels_moves": {
        "case": "moves",
        "way": "way",
        "p50_us": "us",
        "gb_per_s": "GB/s",
        "% of ceiling": "% of the ceiling",
    },
    "index_rivals": {
        "case": "index; mean us a request, look-up and insert, in workload",
        "a": "a",
        "b": "b",
        "c": "c",
        "d": "d",
        "e": "e",
        "f": "f",
    },
}


def newest(bench: str) -> list[dict[str, Any]]:
    """The rows of the last run of a benchmark."""
    path = RESULTS / f"{bench.removesuffix('_single')}.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first = max(i for i, row in enumerate(rows) if _name(bench, row) == _name(bench, rows[-1]))
    names: set[tuple[str, ...]] = set()
    block: list[dict[str, Any]] = []
    for row in reversed(rows[: first + 1]):
        if _name(bench, row) in names:
            break
        names.add(_name(bench, row))
        block.append(row)
    return block[::-1]


def render(text: str) -> str:
    """The README with every table made anew."""
    return re.sub(
        r"<!-- bench:(\w+) -->\n.*?<!-- end -->",
        lambda found: f"<!-- bench:{found[1]} -->\n{_table(found[1])}<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def _name(bench: str, row: dict[str, Any]) -> tuple[str, ...]:
    """What tells a row from the others of its run."""
    first = next(iter(COLUMNS[bench]))
    return tuple(
        str(row.get(column))
        for column in {
            "kernels_moves": (first, "way"),
            "engine_gpu": (first, "cache"),
            "engine_gpu_single": (first, "cache"),
        }.get(bench, (first,))
    )


def _table(bench: str) -> str:
    if bench == "eviction":
        return _evictions()
    rows, columns = newest(bench), COLUMNS[bench]
    if not rows:
        return ""
    if bench.startswith("engine_gpu"):  # one workload has columns of its own
        rows = [row for row in rows if (row["workload"] == "single") == bench.endswith("single")]
    if bench == "index_rivals":
        rows = _by_index(rows)
    lines = ["| " + " | ".join(columns.values()) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    digits = 4 if bench.startswith("kernels") else 2 if bench.startswith("engine_gpu") else None
    lines += ["| " + " | ".join(_cell(row.get(name), digits) for name in columns) + " |" for row in rows]
    about = rows[-1]
    kind = f", {about['dtype']}" if "dtype" in about else ""
    where = about["gpu"]["name"] if "gpu" in about else f"{about['cores']} cores of {about['cpu']}{kind}"
    lines.append(f"\n{where}; torch {about['versions']['torch']}, {about['date']}.\n")
    return "\n".join(lines)


def _by_index(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row an index, with its mean cost in each workload; who could not be measured is left out."""
    indexes: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "mean_us" in row:
            label = row["case"].rsplit(", ", 1)[1] + (
                f" {row['version']}" if "version" in row else f", {row.get('core', 'source')}"
            )
            indexes.setdefault(label, {**row, "case": label})[row["workload"]] = row["mean_us"]
    return list(indexes.values())


def _evictions() -> str:
    """Every policy at every capacity, and how far it is from LRU to the optimum."""
    path = RESULTS / "eviction.jsonl"
    if not path.exists():
        return ""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["trace"], row["policy"], row["percent"]] = row
    percents = sorted({percent for _, _, percent in rows})
    lines = ["| trace | policy | " + " | ".join(f"{percent} %" for percent in percents) + " | mean | worst, points |"]
    lines.append("|" + "---|" * (len(percents) + 4))
    for trace, policy in dict.fromkeys((trace, policy) for trace, policy, _ in rows):
        mine = [rows[trace, policy, percent] for percent in percents]
        pressed = [row["gap_closed"] for row in mine if row["pressure"]]
        mean = f"{100 * fmean(pressed):+.1f}" if pressed and policy not in ("lru", "min") else ""
        worst = f"{min(row['points_over_lru'] for row in mine):+.2f}" if mean else ""
        cells = [_evicted(row) for row in mine]
        lines.append(f"| {trace} | {policy} | " + " | ".join(cells) + f" | {mean} | {worst} |")
    return "\n".join(lines) + "\n"


def _evicted(row: dict[str, Any]) -> str:
    hit = f"{100 * row['page_hit_rate']:.2f}"
    if row["policy"] in ("lru", "min") or row["gap_closed"] is None:
        return hit
    closed = f"{100 * row['gap_closed']:+.0f}"
    return f"{hit} (**{closed}**)" if row["pressure"] else f"{hit} ({closed})"


def _cell(value: object, digits: int | None = None) -> str:
    """A value for people; small ones with so many digits, if they are given."""
    if isinstance(value, float) and digits is not None and 0 < value < 10:
        return f"{value:.{digits}f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.2f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
