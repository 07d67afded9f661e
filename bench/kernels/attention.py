"""Paged attention against the machine's floor, our targets, and others: `python -m bench.kernels.attention`.

Llama-3.1-8B's shape in bf16, pages of 16 tokens scattered over a large pool. For each case:

    floor    the larger of KV bytes (shared ones once) by the copy speed, and operations by the speed of a product; both
             speeds are measured first, in the same process
    right?   every contestant runs into an output of NaN, over a pool whose unused pages are NaN, and sampled rows are
             compared with float64; who is wrong is not timed
    race     CUDA graphs over enough layers that nothing is found in the L2 cache, contestants in turn (timing.py)

`ours` groups requests by what they share, `plain` is the same kernels without grouping, `sdpa` PyTorch over contiguous keys
and values, `flashinfer` and `cascade` FlashInfer, `fa3` FlashAttention-3, where they are installed. Plans are made before
the timing; what ours costs on the host is `plan ms`. A context counts the new tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from bench.common import save, table
from bench.kernels import flash_attention, flashinfer
from bench.kernels.cases import CASES, LLAMA, TOY, TOY_CASES, Case, Inputs, Shape
from bench.kernels.contestants import Contestant, ours, plain_torch
from bench.kernels.judge import require_right
from bench.kernels.timing import Act, Ceilings, Timing, ceilings, race, rotation

COLUMNS = [
    "case", "ours_ms", "rate", "% of floor", "target_ms", "met", "plain_ms", "flashinfer_ms", "cascade_ms", "fa3_ms",
    "sdpa_ms",
]  # fmt: skip
OTHERS = ("sdpa", "flashinfer", "cascade", "fa3")
_NO_LOSS = 1.03  # grouping may take so much of plain's time


def measure(
    case: Case, shape: Shape, ceiling: Ceilings, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """One row of the table."""
    cycle = rotation(case.kv_bytes(shape), shape.num_layers)
    floor_s = max(case.kv_bytes(shape) / ceiling.copy_bytes_per_s, case.flops(shape) / ceiling.flops_per_s)
    inputs = Inputs(case, shape, cycle, device, options.seed)
    row: dict[str, Any] = {"case": case.name}
    contestants: dict[str, Contestant] = {}
    for contestant in _contestants(inputs, options.rivals):
        try:
            row[f"{contestant.name}_error"] = require_right(contestant, inputs, options.seed)
            contestants[contestant.name] = contestant
        except Exception as error:  # a rival that cannot run or is wrong is left out, and said so
            if contestant.name not in OTHERS:
                raise
            print(f"  {contestant.name} is left out: {type(error).__name__}: {error}")
    acts = {name: contestant.act for name, contestant in contestants.items()}
    found = _race(acts, cycle=cycle, expected_s=floor_s, device=device, replays=options.replays)
    for name, timing in found.items():
        row |= {f"{name}_ms": timing.p50_ms, f"{name}_p20_ms": timing.p20_ms, f"{name}_p80_ms": timing.p80_ms}
    return row | _verdict(case, shape, found["ours"].p50_ms, row.get("plain_ms"), floor_s) | {
        "plan_ms": contestants["ours"].plan_ms,
        "layers": inputs.kv.shape[1],
        "cycle": cycle,
    }  # fmt: skip


def _contestants(inputs: Inputs, rivals: bool) -> Iterator[Contestant]:
    yield ours(inputs, share=True)
    if inputs.case.shares:
        yield ours(inputs, share=False)
    yield from plain_torch(inputs)
    if not rivals:
        return
    for library, ways in (
        (flashinfer, flashinfer.flashinfer_ways),
        (flash_attention, flash_attention.flash_attention_ways),
    ):
        try:
            if library.available():
                yield from ways(inputs)
        except Exception:  # whatever a rival raises, the row is ours
            traceback.print_exc()


def _race(acts: Mapping[str, Act], **how: Any) -> dict[str, Timing]:
    """The race; without the others where one of them cannot be recorded in a graph."""
    try:
        return race(acts, **how)
    except RuntimeError:
        mine = {name: act for name, act in acts.items() if name not in OTHERS}
        if len(mine) == len(acts):
            raise
        traceback.print_exc()
        print(f"  timed again without {', '.join(sorted(set(acts) - set(mine)))}")
        return race(mine, **how)


def _verdict(case: Case, shape: Shape, ours_ms: float, plain_ms: float | None, floor_s: float) -> dict[str, Any]:
    """Rates, how near to the floor, whether the target is met, and whether grouping lost."""
    bandwidth = case.kv_bytes(shape) / ours_ms / 1e9
    tflops = case.flops(shape) / ours_ms / 1e9
    reads = case.new == 1
    return {
        "tb_per_s": bandwidth,
        "tflop_per_s": tflops,
        "rate": f"{bandwidth:.2f} TB/s" if reads else f"{tflops:.0f} TFLOP/s",
        "floor_ms": floor_s * 1e3,
        "% of floor": 100 * floor_s * 1e3 / ours_ms,
        "target_ms": case.target_ms,
        "met": None if case.target_ms is None else ("yes" if ours_ms <= case.target_ms else "no"),
        "grouped_by_plain": None if plain_ms is None else ours_ms / plain_ms,
        "grouping_lost": None if plain_ms is None else ours_ms > _NO_LOSS * plain_ms,
    }


def run(cases: Sequence[Case], shape: Shape, device: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases, each printed as it is done. A case that fails has a row that says so."""
    ceiling = ceilings(device, small=options.toy)
    print(f"ceilings: copy {ceiling.copy_bytes_per_s / 1e12:.3f} TB/s, product {ceiling.flops_per_s / 1e12:.1f} TFLOP/s")
    rows = []
    for case in cases:
        start = time.perf_counter()
        try:
            row = measure(case, shape, ceiling, device, options)
        except Exception as error:  # the next case may do; this one is reported, and the exit status says so
            traceback.print_exc()
            row = {"case": case.name, "target_ms": case.target_ms, "failed": f"{type(error).__name__}: {error}"[:500]}
        rows.append(
            row | {"copy_tb_per_s": ceiling.copy_bytes_per_s / 1e12, "product_tflop_per_s": ceiling.flops_per_s / 1e12}
        )
        print(_line(rows[-1]), f"({time.perf_counter() - start:.1f} s)", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['case']}: FAILED, {row['failed']}"
    others = [f"{name} {row[f'{name}_ms']:.4f}" for name in ("plain", *OTHERS) if f"{name}_ms" in row]
    goal = f", target {row['target_ms']} {row['met']}" if row["target_ms"] else ""
    lost = ", GROUPING LOST" if row["grouping_lost"] else ""
    spread = f"{row['ours_p20_ms']:.4f}-{row['ours_p80_ms']:.4f}"
    return (
        f"{row['case']}: {row['ours_ms']:.4f} ms ({spread}), {row['rate']}, "
        f"{row['% of floor']:.0f} % of floor {row['floor_ms']:.4f}"
        f"{goal}{lost}; plan {row['plan_ms']:.2f} ms on the host; error {row['ours_error']:.1e}; {', '.join(others)}"
    )


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[], help="only cases whose name has one of these texts in it")
    parser.add_argument("--quick", action="store_true", help="the cases of the targets only, 10 replays")
    parser.add_argument("--replays", type=int, default=40)
    parser.add_argument("--no-rivals", dest="rivals", action="store_false", help="leave FlashInfer and FlashAttention out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="tiny cases, on a CPU too; nothing is kept")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not options.toy:
        print("no CUDA device: this benchmark times kernels on a GPU (--toy tries its code on a CPU)", file=sys.stderr)
        return 2
    options.rivals = options.rivals and cuda and not options.toy
    if options.quick or options.toy:
        options.replays = 1 if options.toy else 10
    cases = TOY_CASES if options.toy else tuple(case for case in CASES if case.target_ms or not options.quick)
    chosen = [case for case in cases if not options.cases or any(text in case.name for text in options.cases)]
    rows = run(chosen, TOY if options.toy else LLAMA, torch.device("cuda" if cuda else "cpu"), options)
    print(table(rows, COLUMNS))
    if not options.toy:
        save("kernels_attention", rows, options.seed)
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
