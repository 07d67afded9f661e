"""How many of 30 seeds catch each planted fault, and what finds it first.

Run it when a generator changes: python tests/mutants/sweep.py [seeds] [examples] [part of a fault's name]
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

from tests.mutants.driver import drive  # noqa: E402
from tests.mutants.faults import FAULTS, planted  # noqa: E402


def sweep(name: str | None, seeds: int, examples: int) -> tuple[int, Counter[str]]:
    caught, how = 0, Counter()
    for number in range(seeds):
        with planted(name) if name else nullcontext():
            error = drive(number, examples)
        caught += error is not None
        how[getattr(error, "invariant", type(error).__name__)] += error is not None
    return caught, how


def main() -> None:
    seeds, examples = (int(given) for given in (sys.argv[1:3] + ["30", "150"][len(sys.argv) - 1 :])[:2])
    part = sys.argv[3] if len(sys.argv) > 3 else ""
    print(f"{'fault':58} caught  by")
    for name in [None, *FAULTS]:
        if part not in (name or "none"):
            continue
        start = time.perf_counter()
        caught, how = sweep(name, seeds, examples)
        by = ", ".join(f"{what} {count}" for what, count in how.most_common(3) if count)
        print(f"{name or 'none: the clean tree':58} {caught:3}/{seeds}  {by}  ({time.perf_counter() - start:.0f} s)")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
