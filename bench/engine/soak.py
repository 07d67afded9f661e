"""Mixed load for as long as asked, with the cache checked on the way: `python -m bench.engine.soak --seconds 60`.

Requests arrive at random: prompts that share prefixes of several lengths, new ones, long ones; greedy, sampled, penalised;
in three namespaces; with the cache and without; some are cancelled midway. The pool is far smaller than what they ask for,
so pages are evicted and requests wait or make room. After each quarter everything ends: no lease may be left, the cache's
own `check()` must pass, and memory may not have grown. On a GPU, Llama-3.1-8B's shape with a few layers; on a CPU a tiny
one.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
import psutil
import torch
from transformers import LlamaConfig

from bench.common import save
from radixkv.engine import Chunk, Engine, SamplingParams
from radixkv.errors import RadixKVError

_QUARTERS = 4
_GROWTH_BYTES = {
    "cuda_bytes": 32 << 20,
    "rss_bytes": 256 << 20,
}  # allowed between the end of the first quarter and the last;
# on a CPU oneDNN keeps what it compiled for up to 1,024 different numbers of rows


def engine(layers: int, gpu: bool) -> Engine:
    """A small pool under a model that does real work."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=128_256 if gpu else 2_000,
        num_hidden_layers=layers,
        max_position_embeddings=32_768,
        **(shape if gpu else tiny),
    )
    settings: dict[str, Any] = {"num_pages": 3_000, "max_running": 48} if gpu else {"num_pages": 60, "max_running": 12}
    return Engine.random(config, device="cuda" if gpu else "cpu", attention="pages", **settings)


class Load:
    """Random requests, and how they ended."""

    def __init__(self, engine: Engine, seed: int, scale: int) -> None:
        self.engine = engine
        self.rng = np.random.default_rng(seed)
        self.scale = scale
        self.prefixes = [self._ids(int(self.rng.integers(1, 40)) * scale) for _ in range(12)]
        self.ended = self.cancelled = self.refused = self.tokens = 0

    def _ids(self, count: int) -> list[int]:
        return self.rng.integers(10, self.engine.runner.vocab_size, count).tolist()

    def stream(self) -> Any:
        """One more request, begun."""
        rng = self.rng
        own = self._ids(int(rng.integers(1, 8)) * self.scale // 2 + 1)
        shared = self.prefixes[int(rng.integers(len(self.prefixes)))] if rng.random() < 0.8 else []
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 120)),
            temperature=float(rng.choice([0.0, 0.0, 0.8])),
            top_p=float(rng.choice([1.0, 0.9])),
            repetition_penalty=float(rng.choice([1.0, 1.0, 1.2])),
            ignore_eos=True,
        )
        name = str(rng.choice(["", "a", "b"]))
        return self.engine.stream(shared + own, params, namespace=name, cache=bool(rng.random() < 0.9))

    def run(self, seconds: float, at_once: int) -> None:
        """Keep so many requests going; then let all of them end."""
        streams: list[Any] = []
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop or streams:
            while len(streams) < at_once and time.perf_counter() < stop:
                streams.append(self.stream())
            for stream in list(streams):
                if self._advance(stream):
                    streams.remove(stream)

    def _advance(self, stream: Any) -> bool:
        """Read a chunk of a request; whether it has ended."""
        if self.rng.random() < 0.002:
            stream.close()
            self.cancelled += 1
            return True
        try:
            chunk: Chunk | None = next(stream, None)
        except RadixKVError:
            self.refused += 1
            return True
        self.tokens += chunk is not None and chunk.token_id is not None
        self.ended += chunk is None
        return chunk is None


def memory(gpu: bool) -> dict[str, int]:
    """Bytes that are held now."""
    held = {"rss_bytes": psutil.Process().memory_info().rss}
    return held | ({"cuda_bytes": torch.cuda.memory_allocated()} if gpu else {})


def main() -> None:
    """Run, check, save a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    with engine(options.layers, gpu) as under_test:
        under_test.warm_up()
        load = Load(under_test, options.seed, scale=60 if gpu else 4)
        held = []
        for quarter in range(_QUARTERS):
            load.run(options.seconds / _QUARTERS, 96 if gpu else 16)
            stats = under_test.stats()
            under_test.cache.check()
            held.append(memory(gpu))
            counts = {"ended": load.ended, "cancelled": load.cancelled, "refused": load.refused, "tokens": load.tokens}
            counts |= {
                "preemptions": stats.preemptions,
                "recomputed": stats.recomputed_tokens,
                "leases": stats.cache.num_leases,
            }
            print(f"quarter {quarter + 1}: {counts}, {held[-1]}", flush=True)
            if stats.cache.num_leases or stats.running or stats.waiting:
                sys.exit("something is left running or leased")
            if load.refused > load.ended // 10:
                sys.exit("more than a tenth of the requests failed")
        growth = {name: held[-1][name] - held[0][name] for name in held[0]}
        row = {"seconds": options.seconds, "layers": options.layers, **counts, "growth": growth}
        save("engine_soak", [row], options.seed)
        if any(grown > _GROWTH_BYTES[name] for name, grown in growth.items()):
            sys.exit(f"memory grew: {growth}")


if __name__ == "__main__":
    main()
