"""The move kernels against the machine's ceilings and plain PyTorch: `python -m bench.kernels.moves`.

Llama-3.1-8B's shape in bf16, pages of 16 tokens (2 MiB). The ceilings come first: a device copy, and one large copy between
pinned host memory and the device, each way. Every contestant's output is compared before anything is timed, bitwise but for
a compiled rotary embedding, which rounds less often. What stays on the device is timed in CUDA graphs, contestants in turn
(timing.py); a cycle of layers reads more than the L2 cache holds, but for 64 tokens, whose keys a model has just made.
Transfers are timed one call at a time, from an idle device until the last byte is there, so that issuing them counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bench.common import percentiles, save, table
from bench.kernels.cases import LLAMA, TOY, Shape
from bench.kernels.movers import Bench, Contest, copy_contest, page_contests, transfer_contests, write_contests
from bench.kernels.timing import Act, Timing, race

COLUMNS = ["case", "way", "p50_us", "p20_us", "p80_us", "gb_per_s", "% of ceiling"]
_ROUNDS_LESS = 0.1  # values up to five, in bf16, rounded at different places
_LARGE = 1 << 27  # bytes of a transfer


def require_alike(contest: Contest, device: torch.device) -> None:
    """Run every contestant into poison; the outputs must be the first one's.

    Raises:
        ValueError: one differs; its time would mean nothing.
    """
    wanted: list[torch.Tensor] = []
    for name, act in contest.acts.items():
        contest.poison()
        act(0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        given = contest.output()
        wanted = wanted or given
        for one, other in zip(given, wanted, strict=True):
            if "compiled" in name or ("rotary" in name and device.type == "cpu"):  # the interpreter cuts bf16
                torch.testing.assert_close(one, other, rtol=0, atol=_ROUNDS_LESS)
            elif not torch.equal(one, other):
                raise ValueError(f"{contest.name}: {name} moves other bytes than {next(iter(contest.acts))}")


def timed_from_idle(acts: Mapping[str, Act], device: torch.device, replays: int) -> dict[str, Timing]:
    """One call each, contestants in turn, from an idle device until its last byte is there: issuing counts."""
    samples: dict[str, list[float]] = {name: [] for name in acts}
    for replay in range(replays + 3):
        for name, act in acts.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            act(0)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if replay >= 3:
                samples[name].append((time.perf_counter() - start) * 1e3)
    found = {name: percentiles(times) for name, times in samples.items()}
    return {name: Timing(times["p20"], times["p50"], times["p80"]) for name, times in found.items()}


def one_row(case: str, way: str, timing: Timing, num_bytes: float, ceiling: float | None) -> dict[str, Any]:
    """A row of the table; bytes a second of the ceiling, None for a ceiling itself."""
    rate = num_bytes / timing.p50_ms * 1e3
    return {
        "case": case,
        "way": way,
        **{f"{name}_us": getattr(timing, f"{name}_ms") * 1e3 for name in ("p20", "p50", "p80")},
        "num_bytes": num_bytes,
        "gb_per_s": rate / 1e9,
        "% of ceiling": None if ceiling is None else 100 * rate / ceiling,
    }


def ceiling_rows(num_bytes: int, device: torch.device, replays: int) -> dict[str, dict[str, Any]]:
    """The three ceilings, each one large copy."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    host = torch.empty(num_bytes // 8, dtype=torch.uint8, pin_memory=device.type == "cuda")
    acts: dict[str, Act] = {
        "to host": lambda _: host.copy_(source[: len(host)], non_blocking=True),
        "from host": lambda _: target[: len(host)].copy_(host, non_blocking=True),
    }
    copy = race({"copy": lambda _: target.copy_(source)}, cycle=1, expected_s=1e-3, device=device, replays=replays)
    rows = {"device": one_row("ceiling", "device copy", copy["copy"], 2 * num_bytes, None)}
    for name, timing in timed_from_idle(acts, device, replays).items():
        rows[name] = one_row("ceiling", f"pinned, {name}", timing, len(host), None)
    return rows


def run(shape: Shape, device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ceilings, then every contest, each printed as it is done."""
    toy = options.toy
    ceilings = ceiling_rows(1 << 20 if toy else 1 << 31, device, options.replays)
    rows = list(ceilings.values())
    print(table(rows, COLUMNS[:-1]), flush=True)
    bench = Bench(shape, 8 if toy else 2048, device, options.seed)

    def contests() -> Iterator[Contest]:
        for num_tokens in (3, 17) if toy else (64, 8192):
            yield from write_contests(bench, num_tokens, options.compiled)
        for num_copies in (2,) if toy else (1, 64):
            yield copy_contest(bench, num_copies)
        yield from page_contests(bench, 3 if toy else 256)
        for page_size in (1, 16) if toy else (1, 4, 8, 16):
            yield from transfer_contests(bench, page_size, 1 << 15 if toy else _LARGE)

    for contest in contests():
        require_alike(contest, device)
        crossing = next((way for way in ("to host", "from host") if contest.name.startswith(way)), None)
        if crossing:
            timings = timed_from_idle(contest.acts, device, options.replays)
        else:
            timings = race(
                contest.acts,
                cycle=contest.cycle,
                expected_s=contest.num_bytes / 3e12,
                device=device,
                replays=options.replays,
            )
        ceiling = ceilings[crossing or "device"]["gb_per_s"] * 1e9
        found = [one_row(contest.name, way, timing, contest.num_bytes, ceiling) for way, timing in timings.items()]
        print(table(found, COLUMNS), flush=True)
        rows += found
    return rows


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument(
        "--no-compile", dest="compiled", action="store_false", help="leave the compiled rotary embedding out"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="tiny cases, on a CPU too; nothing is kept")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not options.toy:
        print("no CUDA device: this benchmark times kernels on a GPU (--toy tries its code on a CPU)", file=sys.stderr)
        return 2
    if options.toy:
        options.replays, options.compiled = 1, options.compiled and cuda
    rows = run(TOY if options.toy else LLAMA, torch.device("cuda" if cuda else "cpu"), options)
    if not options.toy:
        save("kernels_moves", rows, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
