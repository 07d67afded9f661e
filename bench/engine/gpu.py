"""The engine end to end on a GPU: `python -m bench.engine.gpu [chat] [repo] [longdoc] [single]`.

Llama-3.1-8B's shape with random weights in bf16, greedy, token ids in and out, every answer exactly as long as asked for. A
round's requests are handed over at once; its clock runs from there to its last answer, so planning, the tree, sampling and
all else on the host is in it. Wall time is the sum of the rounds.

Before the timing the engine captures its graphs and compiles what it compiles, and answers a warm-up of other token ids (one
long prompt, then questions about it, as many at once as may run, then a turn more of each). The cache is emptied before each
workload. `--cache off` computes every prompt anew. The goals, and what vLLM 0.24.0 took for the same token ids on one H100,
stand beside.
"""

from __future__ import annotations

import argparse
import ast
import logging
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from bench.common import percentiles, save, table
from bench.engine.gpu_workloads import SMALL, WORKLOADS, Workload, warm_up
from radixkv.engine import Completion, Engine, SamplingParams

COLUMNS = [
    "workload", "cache", "wall_s", "wall_goal_s", "vllm_wall_s", "warm_round_s", "warm_goal_s", "vllm_warm_s", "ttft_p50_s",
    "ttft_p99_s", "out_tok_s", "hit_rate", "computed_tokens",
]  # fmt: skip
SINGLE = ["workload", "cache", "cold_s", "cold_goal_s", "vllm_cold_s", "hit_ms", "hit_goal_ms", "vllm_hit_ms"]

GOALS: dict[str, dict[str, float]] = {
    "chat": {"wall_goal_s": 10.5},
    "repo": {"wall_goal_s": 13.5, "warm_goal_s": 0.95},
    "longdoc": {"warm_goal_s": 0.75},
    "single": {"hit_goal_ms": 10.0, "cold_goal_s": 1.25},
}
VLLM: dict[str, dict[str, dict[str, float]]] = {
    "on": {
        "chat": {"vllm_wall_s": 11.5, "vllm_ttft_p50_s": 0.476, "vllm_out_tok_s": 4259},
        "repo": {"vllm_wall_s": 14.4, "vllm_warm_s": 1.03},
        "longdoc": {"vllm_wall_s": 5.69, "vllm_warm_s": 2.20},
        "single": {"vllm_hit_ms": 23.0, "vllm_cold_s": 1.163},
    },
    "off": {"chat": {"vllm_wall_s": 30.3}, "repo": {"vllm_wall_s": 58.1}, "single": {"vllm_cold_s": 1.166}},
}
"""Measured once, on an H100 80GB; see bench/LOG.md."""


@dataclass(slots=True)
class Measured:
    """A workload's answers and times, by round; and the prompts of its last round."""

    round_s: list[float]
    answers: list[list[Completion]]
    last_prompts: list[np.ndarray]


def send(engine: Engine, workload: Workload, *, cache: bool) -> Measured:
    """Send the rounds, one after another."""
    history: dict[int, np.ndarray] = {}
    done = Measured([], [], [])
    for number, one in enumerate(workload.rounds):
        prompts = [
            np.concatenate([history[ask.session], ask.tokens]) if ask.session in history else ask.tokens for ask in one.asks
        ]
        start = time.perf_counter()
        answers = engine.generate(prompts, SamplingParams(max_tokens=one.max_tokens, ignore_eos=True), cache=cache)
        done.round_s.append(time.perf_counter() - start)
        done.answers.append(answers)
        done.last_prompts = prompts
        for ask, prompt, answer in zip(one.asks, prompts, answers, strict=True):
            history[ask.session] = np.concatenate([prompt, np.array(answer.token_ids, np.int32)])
        computed = sum(answer.computed_tokens for answer in answers)
        first_s = statistics.median(answer.ttft_s for answer in answers)
        print(
            f"  {workload.name}, round {number}: {done.round_s[-1]:.3f} s, {len(prompts)} prompts of about "
            f"{len(prompts[0])} tokens, {computed} computed, first token after {first_s:.3f} s",
            flush=True,
        )
    return done


def row(name: str, cache: str, done: Measured) -> dict[str, Any]:
    """One line of the table."""
    answers = [answer for each in done.answers for answer in each]
    ttft = percentiles([answer.ttft_s for answer in answers])
    wall = sum(done.round_s)
    prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    out_tokens = sum(len(answer.token_ids) for answer in answers)
    found = {
        "workload": name,
        "cache": cache,
        "wall_s": wall,
        "first_round_s": done.round_s[0],
        "warm_round_s": statistics.median(done.round_s[1:]),
        "ttft_p50_s": ttft["p50"],
        "ttft_p99_s": ttft["p99"],
        "out_tok_s": out_tokens / wall,
        "hit_rate": sum(answer.cached_tokens for answer in answers) / prompt_tokens,
        "prompt_tokens": prompt_tokens,
        "computed_tokens": sum(answer.computed_tokens for answer in answers),
        "out_tokens": out_tokens,
        "requests": len(answers),
    }
    if name == "single":
        later = [answer.ttft_s for answer in answers[1:]]
        found |= {"cold_s": answers[0].ttft_s, "hit_ms": statistics.median(later) * 1e3, "hit_max_ms": max(later) * 1e3}
    return found


def same_answers(engine: Engine, workload: Workload) -> float:
    """Share of prompts answered alike on a hit and without the cache; random weights leave many near ties to rounding."""
    prompts = [ask.tokens for ask in workload.rounds[1].asks[:8]]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    hits, cold = (engine.generate(prompts, params, cache=cache) for cache in (True, False))
    return sum(a.token_ids == b.token_ids for a, b in zip(hits, cold, strict=True)) / len(prompts)


def make_engine(arguments: argparse.Namespace) -> Engine:
    """The engine on random weights, on the GPU; or a tiny one on whatever there is."""
    settings = {"max_running": arguments.max_running, "seed": arguments.seed, **dict(arguments.set)}
    if arguments.small:
        config = LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=arguments.layers or 2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
        )  # fmt: skip
        return Engine.random(config, **{"dtype": "float32", "num_pages": 512} | settings)
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=arguments.layers or 32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, tie_word_embeddings=False,
    )  # fmt: skip
    return Engine.random(config, **{"dtype": "bfloat16", "device": "cuda"} | settings)


def prepare(engine: Engine, arguments: argparse.Namespace) -> dict[str, Any]:
    """Warm up; returns how long it took, and how many answers a hit leaves as they are."""
    start = time.perf_counter()
    engine.warm_up(_say)
    print(f"graphs and compiled layers after {time.perf_counter() - start:.1f} s", flush=True)
    prepared = time.perf_counter() - start
    small = {"high": 512, "context": 64} if arguments.small else {}
    other = warm_up(min(arguments.max_running, 64), **small)
    send(engine, other, cache=True)
    return {"prepare_s": prepared, "warm_up_s": time.perf_counter() - start, "same_answers": same_answers(engine, other)}


def run(engine: Engine, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All workloads asked for."""
    about = prepare(engine, arguments)
    rows = []
    for name in arguments.workloads:
        workload = (SMALL if arguments.small else WORKLOADS)[name]()
        for cache in ("on", "off") if arguments.cache == "both" else (arguments.cache,):
            engine.cache.flush()
            before = engine.stats().preemptions
            done = send(engine, workload, cache=cache == "on")
            found = row(name, cache, done) | about | {"preemptions": engine.stats().preemptions - before}
            if not arguments.small:  # goals and rivals are of the real ones
                found |= (GOALS[name] if cache == "on" else {}) | VLLM[cache].get(name, {})
            rows.append(found | _memory())
            if arguments.profile is not None and len(rows) == 1:
                profile(engine, done, arguments.profile, cache=cache == "on")
    return rows


def profile(engine: Engine, done: Measured, path: Path, *, cache: bool) -> None:
    """Ask the last round's prompts again for eight tokens each, and write where the time went: device, then host."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    start = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler:
        engine.generate(done.last_prompts, SamplingParams(max_tokens=8, ignore_eos=True), cache=cache)
    wall = time.perf_counter() - start
    orders = ["self_device_time_total", "self_cpu_time_total"] if torch.cuda.is_available() else ["self_cpu_time_total"]
    tables = [profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80) for order in orders]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"{len(done.last_prompts)} prompts again, 8 tokens each: {wall:.3f} s under the profiler\n" + "\n".join(tables)
    )
    print(f"profile in {path}", flush=True)


def _say(what: str, done: int, total: int) -> None:
    print(f"  {what}: {done} of {total}", flush=True)


def _memory() -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def _setting(text: str) -> tuple[str, Any]:
    """`name=value` of an engine setting."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r}: name=value is needed, such as prefill_chunk=4096")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value  # a word


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; all, if none is named")
    parser.add_argument("--cache", choices=["on", "off", "both"], default="on")
    parser.add_argument("--layers", type=int, help="decoder layers, fewer for a look at the host's part")
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="an engine setting")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a profile of the first workload's last round")
    parser.add_argument("--small", action="store_true", help="a tiny model and tiny workloads; nothing is kept")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.workloads) - set(WORKLOADS)
    if unknown:
        parser.error(f"no workload {', '.join(sorted(unknown))}: there are {', '.join(WORKLOADS)}")
    arguments.workloads = arguments.workloads or list(WORKLOADS)
    return arguments


def main() -> int:
    """Run it."""
    arguments = parse()
    if not arguments.small and not torch.cuda.is_available():
        print("no CUDA device: this benchmark runs on a GPU (--small tries its code on a CPU)", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    start = time.perf_counter()
    with make_engine(arguments) as engine:
        build_s = time.perf_counter() - start
        print(f"{engine!r} with {engine.store.num_pages} pages after {build_s:.1f} s", flush=True)
        rows = [{**found, "build_s": build_s, "layers": arguments.layers} for found in run(engine, arguments)]
    print(table([found for found in rows if found["workload"] != "single"], COLUMNS))
    print(table([found for found in rows if found["workload"] == "single"], SINGLE))
    if not arguments.small:
        save("engine_gpu", rows, arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
