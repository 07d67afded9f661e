"""How many of 30 seeds catch each planted fault, and what finds it.

Run it when the walk changes: python tests/mutants/sweep.py [seeds] [worlds] [part of a fault's name]
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

from tests.core.machine import walk  # noqa: E402
from tests.mutants.faults import FAULTS, WORLDS, planted  # noqa: E402


def sweep(name: str | None, seeds: int, worlds: int) -> Counter[str]:
    """What caught the fault, with how many seeds."""
    how: Counter[str] = Counter()
    for seed in range(seeds):
        with planted(name) if name else nullcontext():
            try:
                walk(seed, worlds)
            except Exception as error:
                how[getattr(error, "invariant", "the model" if type(error) is AssertionError else type(error).__name__)] += 1
    return how


def main() -> None:
    given = [*sys.argv[1:], *["30", str(WORLDS), ""][len(sys.argv) - 1 :]]
    seeds, worlds, part = int(given[0]), int(given[1]), given[2]
    print(f"{'fault':58} caught  by")
    for name in [None, *FAULTS]:
        if part not in (name or "none"):
            continue
        start = time.process_time()
        how = sweep(name, seeds, worlds)
        by = ", ".join(f"{what} {count}" for what, count in how.most_common(4))
        took = time.process_time() - start
        print(f"{name or 'none: the clean tree':58} {how.total():3}/{seeds}  {by}  ({took:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
