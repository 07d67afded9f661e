"""Multi-turn chat on this machine's CPU: radixkv and transformers on the same token ids. `python -m bench.engine.chat`.

Answers of radixkv with the cache on and off are compared before anything is timed against rivals. Every engine's own
answers grow its history, so histories may differ between engines where dtypes round differently; lengths do not.
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
from bench.engine.rivals import Answer, Transformers
from bench.engine.workloads import CHAT_OUT, SHARED, chat_turns

COLUMNS = ["engine", "wall_s", "ttft_cold_ms", "ttft_warm_ms", "decode_tok_s", "computed_tokens", "prompt_tokens"]


def one_at_a_time(engine: Any, sessions: list[list[np.ndarray]]) -> tuple[list[Answer], int, float]:
    """Round-robin, one request at a time: the answers, the prompts' tokens, the wall time."""
    history = [np.empty(0, np.int32) for _ in sessions]
    answers, prompt_tokens = [], 0
    start = time.perf_counter()
    for turn in range(len(sessions[0])):
        for index, session in enumerate(sessions):
            prompt = np.concatenate([history[index], session[turn]])
            answer = engine.answer(index, prompt, CHAT_OUT, SHARED)
            history[index] = np.concatenate([prompt, np.array(answer.token_ids, np.int32)])
            answers.append(answer)
            prompt_tokens += len(prompt)
    return answers, prompt_tokens, time.perf_counter() - start


def together(engine: Radix, sessions: list[list[np.ndarray]]) -> tuple[list[Answer], int, float]:
    """The sessions of a turn at once."""
    history = [np.empty(0, np.int32) for _ in sessions]
    answers, prompt_tokens = [], 0
    start = time.perf_counter()
    for turn in range(len(sessions[0])):
        prompts = [np.concatenate([past, session[turn]]) for past, session in zip(history, sessions, strict=True)]
        done = engine.answer_all(prompts, CHAT_OUT)
        history = [
            np.concatenate([prompt, np.array(answer.token_ids, np.int32)])
            for prompt, answer in zip(prompts, done, strict=True)
        ]
        answers += done
        prompt_tokens += sum(map(len, prompts))
    return answers, prompt_tokens, time.perf_counter() - start


def row(name: str, result: tuple[list[Answer], int, float]) -> dict[str, Any]:
    """One line of the table."""
    answers, prompt_tokens, wall = result
    decode = [(len(answer.token_ids) - 1) / (answer.total_s - answer.ttft_s) for answer in answers]
    return {
        "engine": name,
        "wall_s": wall,
        "ttft_cold_ms": answers[0].ttft_s * 1e3,
        "ttft_warm_ms": statistics.median(answer.ttft_s for answer in answers[3:]) * 1e3,
        "decode_tok_s": statistics.median(decode),
        "computed_tokens": sum(answer.computed_tokens for answer in answers),
        "prompt_tokens": prompt_tokens,
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each engine, interleaved")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--no-rivals", action="store_true")
    arguments = parser.parse_args()
    sessions = chat_turns(arguments.seed)
    dtype = getattr(torch, arguments.dtype)
    rows: list[dict[str, Any]] = []
    for _ in range(arguments.repeats):  # interleaved
        engine = Radix(dtype=arguments.dtype)
        engine.answer_all([np.arange(1000, 1300, dtype=np.int32)], 4)  # warm up
        rows.append(row("radixkv", one_at_a_time(engine, sessions)))
        engine.engine.close()
        engine = Radix(dtype=arguments.dtype)
        rows.append(row("radixkv, sessions of a turn together", together(engine, sessions)))
        engine.engine.close()
        rows.append(row("radixkv, cache off", one_at_a_time(Radix(dtype=arguments.dtype, cache=False), sessions)))
        if not arguments.no_rivals:
            rows += [
                row(f"transformers, {name}", one_at_a_time(Transformers(dtype, keep), sessions))
                for name, keep in (
                    ("no cache", "none"),
                    ("a cache kept per session", "session"),
                    ("system prompt's cache copied", "copied"),
                )
            ]
    best = [_median([one for one in rows if one["engine"] == name]) for name in dict.fromkeys(r["engine"] for r in rows)]
    print(table(best, COLUMNS))
    save("engine_chat", [{"dtype": arguments.dtype, **one} for one in best], arguments.seed)


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: statistics.median(one[key] for one in rows) if isinstance(value, float) else value
        for key, value in rows[0].items()
    }


if __name__ == "__main__":
    main()
