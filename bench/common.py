"""What every benchmark shares: rows with their provenance, percentiles, and a table for people."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def provenance(seed: int) -> dict[str, Any]:
    """Where and with what a row was measured."""
    return {
        "git": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "cores": _cores(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("numpy", "torch", "transformers", "triton")},
        "seed": seed,
        "argv": sys.argv[1:],
    }


def save(bench: str, rows: Sequence[dict[str, Any]], seed: int) -> None:
    """Append rows to bench/results/<bench>.jsonl, and print the last as the machine's line."""
    RESULTS.mkdir(exist_ok=True)
    about = provenance(seed)
    with (RESULTS / f"{bench}.jsonl").open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"bench": bench, **row, **about}) + "\n")
    print(json.dumps({"bench": bench, "rows": list(rows), **about}))


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """p20, p50, p80 and p99 of samples."""
    ordered = sorted(samples)
    return {f"p{q}": ordered[min(int(len(ordered) * q / 100), len(ordered) - 1)] for q in (20, 50, 80, 99)}


def median_time(act: Callable[[], object], repeats: int) -> float:
    """Median seconds of `repeats` calls, after one to warm up."""
    act()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        act()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as a plain table."""
    cells = [list(columns)] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=RESULTS.parent)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                flags = info.read_text()
                amx = " (AMX)" if "amx_bf16" in flags else ""
                return line.split(":", 1)[1].strip() + amx
    return platform.processor() or platform.machine()
