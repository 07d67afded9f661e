"""Questions about one repository on this machine's CPU: radixkv and transformers on the same token ids.

`python -m bench.engine.repository`. The first question is cold; the others share its context of some 6,000 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch

from bench.common import save, table
from bench.engine.radix import Radix
from bench.engine.rivals import Transformers
from bench.engine.workloads import CONTEXT, REPO_OUT, repository_prompts

COLUMNS = ["engine", "wall_s", "ttft_cold_s", "ttft_warm_ms", "speedup", "decode_tok_s", "computed_tokens"]


def run(name: str, engine: Any, prompts: list[np.ndarray]) -> dict[str, Any]:
    """All questions, one after another."""
    start = time.perf_counter()
    answers = [engine.answer(index, prompt, REPO_OUT, CONTEXT) for index, prompt in enumerate(prompts)]
    wall = time.perf_counter() - start
    warm = statistics.median(answer.ttft_s for answer in answers[1:])
    return {
        "engine": name,
        "wall_s": wall,
        "ttft_cold_s": answers[0].ttft_s,
        "ttft_warm_ms": warm * 1e3,
        "speedup": answers[0].ttft_s / warm,
        "decode_tok_s": statistics.median((REPO_OUT - 1) / (answer.total_s - answer.ttft_s) for answer in answers),
        "computed_tokens": sum(answer.computed_tokens for answer in answers),
        "answers": [answer.token_ids for answer in answers],
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--no-rivals", action="store_true")
    arguments = parser.parse_args()
    prompts = repository_prompts()
    dtype = getattr(torch, arguments.dtype)
    rows = []
    for name, settings in (
        ("radixkv", {}),
        ("radixkv, exact", {"exact": True}),
        ("radixkv, int8 weights", {"weights": "int8"}),
    ):
        engine = Radix(dtype=arguments.dtype, **settings)
        engine.answer_all([np.arange(1000, 1300, dtype=np.int32)], 4)  # warm up
        rows.append(run(name, engine, prompts))
        engine.engine.close()
    off = run("radixkv, exact, cache off", Radix(dtype=arguments.dtype, cache=False, exact=True), prompts)
    assert off["answers"] == rows[1]["answers"], "exact mode must answer alike with the cache on and off"
    rows.append(off)
    if not arguments.no_rivals:
        rows.append(run("transformers, context's cache copied", Transformers(dtype, "copied"), prompts))
    same = [sum(a == b for a, b in zip(row.pop("answers"), off["answers"], strict=True)) for row in rows[:3]]
    off.pop("answers", None)
    for row in rows:
        row.pop("answers", None)
    print(table(rows, COLUMNS))
    print(f"answers equal to exact mode's: radixkv {same[0]}/5, exact {same[1]}/5, int8 {same[2]}/5")
    save("engine_repository", [{"dtype": arguments.dtype, **row} for row in rows], seed=0)


if __name__ == "__main__":
    main()
