"""Timing what launches kernels: CUDA graphs over rotated inputs, contestants in turn, and the machine's ceilings.

    one graph    act(0) act(1) ... act(cycle - 1) act(0) ...     `calls` launches, no gaps of the host between them
    one turn     (ours) ours │ rival │ plain                     an event before and after each; the first runs untimed
                                                                 before, so that the host is ahead of the device
    turns        ours │ rival │ plain,  rival │ plain │ ours, …  interleaved: a slow minute is slow for all

Input k of a cycle is another layer of the page store. A cycle reads more than four times what the L2 cache holds, so nothing
is flushed by hand and nothing is found in the cache that a model would not find there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Act", "Ceilings", "Timing", "ceilings", "race", "rotation"]

Act = Callable[[int], object]
"""Enqueues the work on input k of the cycle."""

_L2_BYTES = 50e6  # of an H100
_L2_TIMES = 4
_GRAPH_S = 2e-3  # a graph of this length hides what its start and the events cost


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one call."""

    p20_ms: float
    p50_ms: float
    p80_ms: float


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device does at best: bytes read and written a second by a copy, bf16 operations a second by a product."""

    copy_bytes_per_s: float
    flops_per_s: float


def rotation(num_bytes: float, most: int) -> int:
    """How many different inputs of `num_bytes` to go through, so that together they are far larger than the L2 cache."""
    return min(max(int(-(-_L2_TIMES * _L2_BYTES // num_bytes)), 2), most)


def race(
    acts: Mapping[str, Act], *, cycle: int, expected_s: float, device: torch.device, replays: int = 40
) -> dict[str, Timing]:
    """Time several ways to do the same, in turn.

    Args:
        acts: by name.
        cycle: inputs to go through.
        expected_s: of one call, roughly; short calls are repeated within a graph.
        device: CUDA, or a CPU, where calls are made and timed one by one.
        replays: samples of each; every one is the mean of a graph's calls.

    Returns:
        Timing of one call by name.
    """
    calls = cycle * max(round(_GRAPH_S / expected_s / cycle), 1) if device.type == "cuda" else cycle
    recorded = {name: _recorded(act, cycle, calls, device) for name, act in acts.items()}
    samples: dict[str, list[float]] = {name: [] for name in acts}
    names = list(acts)
    for _ in range(3 if device.type == "cuda" else 0):
        for name in names:
            recorded[name]()
    for turn in range(replays):
        shift = turn % len(names)
        for name, seconds in _timed({name: recorded[name] for name in names[shift:] + names[:shift]}, device).items():
            samples[name].append(seconds / calls * 1e3)
    return {name: _timing(found) for name, found in samples.items()}


def ceilings(device: torch.device, *, small: bool = False) -> Ceilings:
    """Measure both ceilings: a copy of 2 GiB, a product of 8192 x 8192 x 8192 random bf16 numbers."""
    num_bytes, side = (1 << 22, 256) if small else (1 << 31, 8192)
    source = torch.empty(num_bytes // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    acts: dict[str, Act] = {
        "copy": lambda _: target.copy_(source),
        "kernel": lambda _: torch.neg(source, out=target),  # the copy engine is not always the fastest to copy
        "product": lambda _: torch.mm(left, right, out=out),
    }
    found = race(acts, cycle=1, expected_s=1e-3, device=device, replays=5 if small else 40)
    copy_ms = min(found["copy"].p50_ms, found["kernel"].p50_ms)
    return Ceilings(2 * num_bytes / copy_ms * 1e3, 2 * side**3 / found["product"].p50_ms * 1e3)


def _recorded(act: Act, cycle: int, calls: int, device: torch.device) -> Callable[[], object]:
    """Capture `calls` calls into a graph, once they have run for real (which compiles what must be compiled)."""

    def several() -> None:
        for call in range(calls):
            act(call % cycle)

    if device.type != "cuda":
        return several
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for k in range(cycle):
            act(k)
    torch.cuda.current_stream(device).wait_stream(aside)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        several()
    return graph.replay


def _timed(recorded: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Seconds of each, run once, one after another."""
    if device.type != "cuda":
        seconds = {}
        for name, act in recorded.items():
            start = time.perf_counter()
            act()
            seconds[name] = time.perf_counter() - start
        return seconds
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in recorded}
    next(iter(recorded.values()))()  # the device is busy until all that follows is enqueued
    for name, act in recorded.items():
        events[name][0].record()
        act()
        events[name][1].record()
    torch.cuda.synchronize(device)
    return {name: before.elapsed_time(after) / 1e3 for name, (before, after) in events.items()}


def _timing(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    return Timing(ordered[len(ordered) // 5], statistics.median(ordered), ordered[len(ordered) * 4 // 5])
