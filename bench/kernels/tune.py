"""Which tiles suit the attention kernels: every candidate on a few cases. `python -m bench.kernels.tune [narrow|wide]`.

Prints milliseconds by case and candidate, the best marked; what is chosen stands in radixkv_kernels.attention.TILES and in
the defaults of Geometry. A candidate that does not fit the device's registers or shared memory is left out, and said so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from bench.kernels.cases import CASES, LLAMA, TOY, TOY_CASES, Case, Inputs
from bench.kernels.timing import race, rotation
from radixkv_kernels.attention import TILES, Tile, attend
from radixkv_kernels.device_plan import upload
from radixkv_kernels.planning import Geometry, plan

_NARROW_CASES = (
    "decode 1 x 4096",
    "decode 1 x 32768",
    "decode 16 x 4096",
    "decode 64 x 4096",
    "decode 64 x 16384",
    "decode 128 x 1024",
)
_WIDE_CASES = ("prefill 4096", "prefill 512 on a cached 32768", "prefill 8 x 256 on 8192", "prefill 32 x 128 on 4096",
               "decode 64, 16384 shared + 512 own")  # fmt: skip

Candidate = tuple[Mapping[str, int], Mapping[str, Tile]]
"""Settings of Geometry, and tiles."""


def candidates(width: str) -> Iterator[tuple[str, Candidate]]:
    """What is tried, by name."""
    if width == "narrow":
        for keys, warps, stages in ((32, 4, 5), (64, 4, 5), (64, 4, 7), (32, 2, 7), (64, 2, 5), (128, 8, 5), (128, 4, 5)):
            for places in (2, 3, 4):
                tiles = TILES | {"narrow": Tile(keys, warps, stages)}
                yield f"{keys} keys, {warps} warps, {stages} stages, {places} places", ({"narrow_places": places}, tiles)
        return
    for rows, keys, warps, stages, places in (
        (128, 64, 8, 3, 1), (128, 64, 8, 5, 1), (128, 128, 8, 2, 1), (128, 128, 8, 3, 1), (128, 32, 4, 5, 1),
        (64, 64, 4, 3, 2), (64, 64, 4, 5, 2), (64, 128, 4, 2, 1), (64, 128, 4, 3, 1), (128, 64, 8, 3, 2),
    ):  # fmt: skip
        tiles = TILES | {"wide": Tile(keys, warps, stages)}
        yield (
            f"{rows} x {keys}, {warps} warps, {stages} stages, {places} places",
            ({"wide": rows, "wide_places": places}, tiles),
        )


def tune(case: Case, width: str, device: torch.device, toy: bool) -> dict[str, float]:
    """Milliseconds of every candidate that runs."""
    shape = TOY if toy else LLAMA
    cycle = min(rotation(case.kv_bytes(shape), shape.num_layers), 8)
    inputs = Inputs(case, shape, cycle, device, seed=0)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    acts = {}
    for name, (settings, tiles) in candidates(width):
        geometry: Geometry = replace(inputs.geometry(processors), **settings)
        ready = upload(plan(inputs.spans, geometry), geometry, device)

        def act(layer: int, ready=ready, tiles=tiles) -> torch.Tensor:
            query, kv = inputs.query[layer], inputs.kv[:, layer]
            return attend(query, kv, ready, scale=inputs.scale, out=inputs.out, tiles=tiles)

        try:
            act(0)
        except Exception as error:  # Triton raises its own kinds where registers or shared memory do not suffice
            print(f"  {name}: {type(error).__name__} {str(error).splitlines()[0][:80]}", flush=True)
            continue
        acts[name] = act
    floor_s = max(case.kv_bytes(shape) / 3e12, case.flops(shape) / 690e12)
    found = race(acts, cycle=cycle, expected_s=2 * floor_s, device=device, replays=3 if toy else 15)
    return {name: timing.p50_ms for name, timing in found.items()}


def main() -> None:
    """Tune and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("width", nargs="?", choices=("narrow", "wide"), help="which kernel; both if left out")
    parser.add_argument(
        "--toy", action="store_true", help="tiny cases on any device: shows that this runs, measures nothing"
    )
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        sys.exit("no CUDA device is visible: tiles can be tuned on a GPU only (--toy shows that this runs)")
    device = torch.device("cpu" if options.toy and not torch.cuda.is_available() else "cuda")
    for width in ("narrow", "wide") if options.width is None else (options.width,):
        names = _NARROW_CASES if width == "narrow" else _WIDE_CASES
        for case in TOY_CASES[:2] if options.toy else [case for case in CASES if case.name in names]:
            print(f"{width}: {case.name}, target {case.target_ms} ms", flush=True)
            found = tune(case, width, device, options.toy)
            best = min(found.values())
            for name, ms in sorted(found.items(), key=lambda pair: pair[1]):
                print(f"  {ms:9.4f} ms  {ms / best:5.2f}  {name}")


if __name__ == "__main__":
    main()
