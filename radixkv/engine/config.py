"""Settings of the engine and of one request, checked once when they are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from radixkv.errors import ConfigError
from radixkv.policies import POLICIES

__all__ = ["EngineConfig", "SamplingParams"]

_MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine runs.

    Attributes:
        page_size: tokens in a page, a power of two.
        num_pages: pages in the pool; else `pool_bytes`; else `pool_fraction` of the memory free once weights are loaded.
        dtype: of weights and KV; "auto" is bfloat16 where the hardware multiplies it natively, else float32.
        device: "cpu", "cuda", "cuda:1"; "auto" takes a GPU where there is one.
        max_context: longest prompt plus answer; None is what the model was made for.
        prefill_chunk: prompt tokens computed in one forward pass; the last pass may be half as long again.
        max_running: requests that decode together.
        cache: reuse prefixes. Off, nothing is looked up or kept.
        exact: make a hit answer bit for bit as a miss: prefill in blocks of `exact_block` tokens at fixed positions, reuse
            whole blocks, decode each request alone. Slower; see docs/design/0006-exact.md.
        exact_block: tokens in such a block, a multiple of `page_size`.
        policy: the eviction policy.
        weights: "native", or "int8" weights on a CPU: half the memory traffic, and answers that differ a little.
        num_threads: CPU threads; None is what torch finds.
    """

    page_size: int = 16
    num_pages: int | None = None
    pool_bytes: int | None = None
    pool_fraction: float | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"
    max_context: int | None = None
    prefill_chunk: int = 1024
    max_running: int = 16
    cache: bool = True
    exact: bool = False
    exact_block: int = 128
    policy: str = "lru"
    weights: Literal["native", "int8"] = "native"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise ConfigError("page_size", self.page_size, "a power of two, such as 16")
        for name in ("prefill_chunk", "max_running", "exact_block"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "at least 1")
        for name in ("num_pages", "pool_bytes", "max_context", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, value, "at least 1, or None")
        if self.exact_block % self.page_size:
            raise ConfigError("exact_block", self.exact_block, f"a multiple of page_size, {self.page_size}")
        if self.dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise ConfigError("dtype", self.dtype, "auto, float32, float16 or bfloat16")
        if self.weights not in ("native", "int8"):
            raise ConfigError("weights", self.weights, "native or int8")
        if self.policy not in POLICIES:
            raise ConfigError("policy", self.policy, f"one of {', '.join(sorted(POLICIES))}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one answer are chosen. The defaults are greedy.

    Attributes:
        max_tokens: at most so many; 0 computes the prompt only, which warms the cache.
        temperature: 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities sum to at least this.
        min_p: drop tokens less likely than this share of the likeliest one.
        repetition_penalty: divide (or, below zero, multiply) the logits of tokens seen in prompt or answer by this.
        seed: makes a sampled answer repeatable; None draws one.
        stop: texts that end the answer; they are not part of it.
        stop_token_ids: tokens that end the answer, besides the model's own end-of-text tokens.
        ignore_eos: go on past the model's own end-of-text tokens.
        logprobs: report the log probability of each token and of this many likeliest ones; None reports none.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop: str | tuple[str, ...] = self.stop  # one text is taken for a list of one
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        object.__setattr__(self, "stop_token_ids", frozenset(self.stop_token_ids))
        limits: list[tuple[str, bool, str]] = [
            ("max_tokens", self.max_tokens >= 0, "at least 0"),
            ("temperature", 0 <= self.temperature <= 100, "0 to 100"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0 and at most 100"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            ("stop", all(isinstance(text, str) and text for text in self.stop), "texts that are not empty"),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= _MAX_LOGPROBS,
                f"0 to {_MAX_LOGPROBS}, or None",
            ),
        ]
        for name, fits, expected in limits:
            if not fits:
                raise ConfigError(name, getattr(self, name), expected)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_k == 1
