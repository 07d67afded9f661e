"""Clocks that count nanoseconds, and what reading one costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

Clock = Callable[[], int]
CLOCKS: dict[str, Clock] = {"cpu": time.process_time_ns, "wall": time.perf_counter_ns}
"""cpu: what this process used, on all its threads; what else runs on the machine is not in it but for its cold caches."""


def overhead_us(clock: Clock) -> float:
    """Microseconds between two readings with nothing between them: in every sample, never taken off."""
    samples = []
    for _ in range(10_000):
        start = clock()
        samples.append(clock() - start)
    return statistics.median(samples) / 1e3
