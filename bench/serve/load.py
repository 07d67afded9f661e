"""A server under load, with the cache on and off: `python -m bench.serve.load`. Ends within five minutes on two cores.

Arrivals are those of a recorded chat service (bench/serve/arrivals.py), made smaller: every length is divided by --scale,
and gaps are stretched until --rate requests come a second. They are open-loop: a request is sent when it is due, however
many are still unanswered, and its first token is timed from when it was due. Both servers get the same requests: a slice
of the time on one, then the same on the other, so that what else the machine does meets both; a slice ends with its last
answer, so a backlog is not carried into the next. Without --rate, it is chosen on the spot: the cached server answers a
few requests of mean length alone, and the rate is what would keep it busy for --load of the time, one at a time.

Greedy answers of both servers are compared. In bfloat16 they may differ, because a hit computes fewer rows at once and so
rounds otherwise; prompts are random tokens here, whose next token is rarely sure. --dtype float32 shows how many stay.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from bench.common import percentiles, save, table
from bench.serve.arrivals import TRACE, Arrival, at_rate, draw
from bench.serve.openloop import Outcome, replay
from bench.serve.process import ServerProcess, serving

COLUMNS = [
    "cache",
    "requests",
    "failed",
    "hit_rate",
    "ttft_p50_s",
    "ttft_p99_s",
    "gap_p50_ms",
    "gap_p99_ms",
    "goodput_per_s",
    "busy",
    "wall_s",
]
_PROBES = 6  # the first one warms up; of the others the fastest counts, as the one least disturbed
_CONTEXT = 8192


def main() -> None:
    """Run it."""
    options = _parser().parse_args()
    arrivals = draw(options.trace, options.requests, options.scale, _CONTEXT, options.seed)
    servers = ["--dtype", options.dtype, "--log-level", "info"]
    with (
        serving(options.model, servers) as cached,
        serving(options.model, [*servers, "--no-enable-prefix-caching"]) as plain,
    ):
        rate = options.rate or choose_rate(cached, arrivals, options.load)
        if len(arrivals) / rate > options.seconds:
            arrivals = draw(options.trace, max(int(rate * options.seconds), 2), options.scale, _CONTEXT, options.seed)
        due = at_rate(arrivals, rate)
        _describe(due, rate, options.scale)
        _warm_up(plain, arrivals)
        on, off = _alternate((cached, plain), due, options.slices, options.patience)
    bounds = (options.ttft_bound, options.gap_bound)
    rows = [summary("off", off, bounds), summary("on", on, bounds)]
    print(table(rows, COLUMNS))
    same = identical(_flat(on), _flat(off))
    print(
        f"goodput: requests a second with a first token within {bounds[0]:g} s and at most {bounds[1]:g} s a token after it"
    )
    print(f"greedy answers alike, on and off: {same:.1%} ({options.dtype})" if same is not None else "nothing to compare")
    for cache, one in [("on", one) for one in _flat(on)] + [("off", one) for one in _flat(off)]:
        if one.error:
            print(f"failed, cache {cache}, due at {one.due_s:.1f} s: {one.error}")
    about = {"model": options.model, "dtype": options.dtype, "scale": options.scale, "rate": rate, "identical": same}
    limits = {"ttft_bound_s": bounds[0], "gap_bound_s": bounds[1], "endless_cache_hit_rate": endless(due)}
    save("serve_load", [{**row, **about, **limits} for row in rows], options.seed)


def choose_rate(server: ServerProcess, arrivals: Sequence[Arrival], load: float) -> float:
    """Requests a second that would keep the cached server busy for `load` of the time, one at a time."""
    prompt = int(statistics.fmean(len(one.prompt) for one in arrivals))
    output = max(int(statistics.fmean(one.max_tokens for one in arrivals)), 2)
    probes = [Arrival(0.0, [1000 + (prompt * at + i) % 30_000 for i in range(prompt)], output, 0) for at in range(_PROBES)]
    outcomes = [asyncio.run(replay(server.url, [one], 120.0))[0] for one in probes][1:]
    if any(one.error for one in outcomes):
        raise RuntimeError(f"a probe failed: {next(one.error for one in outcomes if one.error)}")
    first_s = min(one.ttft_s for one in outcomes)
    rest_s = min(one.end_s - one.first_s for one in outcomes)
    flushed = httpx.post(f"{server.url}/flush_cache", headers={"authorization": f"Bearer {server.admin_token}"}, timeout=60)
    flushed.raise_for_status()
    return load / (first_s * (1 - endless(arrivals)) + rest_s)


def endless(arrivals: Sequence[Arrival]) -> float:
    """The hit rate of a cache that never evicts, and holds every earlier prompt: answers not counted."""
    return sum(one.shared_tokens for one in arrivals) / sum(len(one.prompt) for one in arrivals)


def summary(cache: str, slices: Sequence[Sequence[Outcome]], bounds: tuple[float, float]) -> dict[str, Any]:
    """One server's line."""
    outcomes = _flat(slices)
    whole = [one for one in outcomes if not one.error]
    ttfts, gaps = [one.ttft_s for one in whole], [gap for one in whole for gap in one.gaps_s]
    good = sum(one.ttft_s <= bounds[0] and one.mean_gap_s <= bounds[1] for one in whole)
    wall_s = sum(max((one.end_s for one in part), default=0.0) for part in slices)
    return {
        "cache": cache,
        "requests": len(outcomes),
        "failed": len(outcomes) - len(whole),
        "hit_rate": sum(one.cached_tokens for one in whole) / max(sum(one.prompt_tokens for one in whole), 1),
        "ttft_p50_s": percentiles(ttfts)["p50"] if ttfts else None,
        "ttft_p99_s": percentiles(ttfts)["p99"] if ttfts else None,
        "gap_p50_ms": percentiles(gaps)["p50"] * 1e3 if gaps else None,
        "gap_p99_ms": percentiles(gaps)["p99"] * 1e3 if gaps else None,
        "goodput_per_s": good / wall_s if wall_s else 0.0,
        "good": good,
        "busy": sum(_busy(part) for part in slices) / wall_s if wall_s else 0.0,
        "wall_s": wall_s,
    }


def identical(one: Sequence[Outcome], other: Sequence[Outcome]) -> float | None:
    """The share of requests answered by both whose answers are equal."""
    both = [(a.text, b.text) for a, b in zip(one, other, strict=True) if not a.error and not b.error]
    return sum(a == b for a, b in both) / len(both) if both else None


def _alternate(
    servers: tuple[ServerProcess, ServerProcess], due: Sequence[Arrival], num_slices: int, patience_s: float
) -> tuple[list[list[Outcome]], list[list[Outcome]]]:
    """Each slice of the time on one server, then on the other, which is idle meanwhile; what was cached stays."""
    length_s = due[-1].at_s / num_slices
    results: tuple[list[list[Outcome]], list[list[Outcome]]] = ([], [])
    for index in range(num_slices):
        start_s, last = index * length_s, index == num_slices - 1
        part = [one for one in due if start_s <= one.at_s and (last or one.at_s < start_s + length_s)]
        shifted = [replace(one, at_s=one.at_s - start_s) for one in part]
        for server, slices in zip(servers, results, strict=True):
            slices.append(asyncio.run(replay(server.url, shifted, patience_s)))
    return results


def _flat(slices: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    return [one for part in slices for one in part]


def _busy(outcomes: Sequence[Outcome]) -> float:
    """Seconds in which at least one request was unanswered."""
    busy, reached = 0.0, 0.0
    for one in sorted(outcomes, key=lambda one: one.due_s):
        busy += max(one.end_s - max(one.due_s, reached), 0.0)
        reached = max(reached, one.end_s)
    return busy


def _warm_up(server: ServerProcess, arrivals: Sequence[Arrival]) -> None:
    """What the other server had from its probes."""
    length = int(statistics.fmean(len(one.prompt) for one in arrivals))
    asyncio.run(replay(server.url, [Arrival(0.0, list(range(1000, 1000 + length)), 4, 0)], 120.0))


def _describe(arrivals: Sequence[Arrival], rate: float, scale: int) -> None:
    prompts, outputs = [len(one.prompt) for one in arrivals], [one.max_tokens for one in arrivals]
    print(
        f"{len(arrivals)} requests at {rate:.2f}/s, open-loop; lengths are the trace's / {scale}: prompts "
        f"{statistics.fmean(prompts):.0f} tokens on average (at most {max(prompts)}), answers "
        f"{statistics.fmean(outputs):.0f} (at most {max(outputs)}); a cache without end would find {endless(arrivals):.1%}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=120, help="at most; fewer where --seconds says so")
    parser.add_argument("--rate", type=float, default=None, help="requests a second; else chosen by --load")
    parser.add_argument("--load", type=float, default=0.65, help="share of the time the cached server should be busy")
    parser.add_argument("--seconds", type=float, default=90.0, help="longest time over which requests arrive")
    parser.add_argument("--slices", type=int, default=4, help="into which the time is cut")
    parser.add_argument("--scale", type=int, default=32, help="what lengths are divided by")
    parser.add_argument("--ttft-bound", type=float, default=2.0, help="seconds, for goodput")
    parser.add_argument("--gap-bound", type=float, default=0.2, help="seconds a token, for goodput")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds after which a request has failed")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--seed", type=int, default=2, help="of the sample; 2 has about the reuse of the whole trace")
    return parser


if __name__ == "__main__":
    main()
