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

_GPU_FIELDS = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu",
)  # fmt: skip


def provenance(seed: int) -> dict[str, Any]:
    """Where and with what a row was measured."""
    return {
        "git": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "cores": _cores(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("numpy", "torch", "transformers", "triton")} | _rivals_installed(),
        "seed": seed,
        "argv": sys.argv[1:],
    } | _gpu()


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
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=RESULTS.parent)
    except OSError as error:  # a GPU machine without git: hours of results are worth more than the hash
        return f"unknown: {error}"
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _rivals_installed() -> dict[str, str]:
    found = {name: _version(name) for name in ("flashinfer-python", "flash-attn", "flash-attn-3", "vllm")}
    return {name: number for name, number in found.items() if number is not None}


def _gpu() -> dict[str, Any]:
    """The GPU that torch uses, as a row's `gpu`; nothing where the benchmark has not imported torch, or there is none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    gpu = {"name": about.name, "memory_bytes": about.total_memory, "cuda": torch.version.cuda}
    return {"gpu": gpu | _driver_facts(str(getattr(about, "uuid", "")))}


def _driver_facts(uuid: str) -> dict[str, str]:
    """What the driver says of clocks (MHz) and power (W) right after the run; or why it says nothing."""
    one = [f"--id=GPU-{uuid.removeprefix('GPU-')}"] if uuid else []
    asked = ["nvidia-smi", *one, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return {"driver_facts": f"none: {error}"[:200]}
    values = done.stdout.strip().splitlines()[0].split(", ")
    return dict(zip(_GPU_FIELDS, values, strict=False))


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
