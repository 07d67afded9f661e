"""One measurement in a process of its own: `python -m bench.index.worker '{"task": "workload", ...}'`.

A fresh process makes memory comparable and keeps a rival's imports, threads and crashes to itself. The answer is the
last line of the output, as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_S = 1500


def ask(task: str, *, python: str = sys.executable, **options: Any) -> dict[str, Any]:
    """Run a task in a new process of that interpreter.

    Raises:
        WorkerError: it failed or took too long; says why in one line.
    """
    command = [python, "-m", "bench.index.worker", json.dumps({"task": task, **options})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise WorkerError(f"more than {LIMIT_S} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise WorkerError(lines[-1].strip())
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


class WorkerError(Exception):
    """A task failed in its process."""


def _workload(*, name: str, index: str, seed: int, quick: bool, clock: str, passes: int, judged: bool) -> dict[str, Any]:
    from bench.index.index import named
    from bench.index.replay import measure
    from bench.index.workloads import make

    made = named(index)
    return measure(made, make(name, seed, quick=quick), clock, passes, judged=judged) | made.about()


def _ceiling(*, name: str, seed: int, quick: bool, clock: str) -> dict[str, Any]:
    from bench.index.replay import ceiling
    from bench.index.workloads import make

    return ceiling(make(name, seed, quick=quick), clock)


def _evictions(*, index: str, num_leaves: int, clock: str, seed: int) -> dict[str, Any]:
    from bench.index.evictions import measure
    from bench.index.index import named

    made = named(index)
    return measure(made, num_leaves, clock, seed) | made.about()


def _scale(*, num_sessions: int, clock: str, seed: int) -> dict[str, Any]:
    from bench.index.index import INDEXES
    from bench.index.scale import measure

    return measure(num_sessions, clock, seed) | INDEXES["tokens"].about()


def _turns(*, num_tokens: int, form: str, clock: str, seed: int) -> dict[str, Any]:
    from bench.index.index import INDEXES
    from bench.index.turns import measure

    return measure(num_tokens, form, clock, seed) | INDEXES[form].about()


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "ceiling": _ceiling,
    "evictions": _evictions,
    "scale": _scale,
    "turns": _turns,
    "workload": _workload,
}

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(TASKS[given.pop("task")](**given)))
