"""Settings of the engine and of one request, checked once when they are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral, Real
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
        num_pages: pages in the pool; if None, what `pool_bytes` hold.
        pool_bytes: bytes of the pool; if None, `pool_fraction` of the memory that is free once weights are loaded.
        pool_fraction: None is 0.25 on a CPU and 0.85 on a GPU. Working views come on top of the pool.
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
    prefill_chunk: int = 2048
    max_running: int = 16
    cache: bool = True
    exact: bool = False
    exact_block: int = 128
    policy: str = "lru"
    weights: Literal["native", "int8"] = "native"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("page_size", "prefill_chunk", "max_running", "exact_block"):
            if not (_is_count(getattr(self, name)) and getattr(self, name) >= 1):
                raise ConfigError(name, getattr(self, name), "a whole number, at least 1")
        for name in ("num_pages", "pool_bytes", "max_context", "num_threads"):
            value = getattr(self, name)
            if value is not None and not (_is_count(value) and value >= 1):
                raise ConfigError(name, value, "a whole number, at least 1, or None")
        if self.page_size & (self.page_size - 1):
            raise ConfigError("page_size", self.page_size, "a power of two, such as 16")
        if self.pool_fraction is not None and not (_is_number(self.pool_fraction) and 0 < self.pool_fraction <= 1):
            raise ConfigError("pool_fraction", self.pool_fraction, "above 0 and at most 1, or None")
        if self.exact and self.exact_block % self.page_size:
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
        if not isinstance(stop, (str, list, tuple)):
            raise ConfigError("stop", stop, "texts that are not empty")
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        try:
            object.__setattr__(self, "stop_token_ids", frozenset(self.stop_token_ids))
        except TypeError:
            raise ConfigError("stop_token_ids", self.stop_token_ids, "token ids") from None
        count, number, penalty = _is_count, _is_number, self.repetition_penalty
        limits: list[tuple[str, bool, str]] = [
            ("max_tokens", count(self.max_tokens) and self.max_tokens >= 0, "a whole number, at least 0"),
            (
                "temperature",
                number(self.temperature) and (self.temperature == 0 or 1e-3 <= self.temperature <= 100),
                "0, or 0.001 to 100",
            ),
            ("top_k", count(self.top_k) and self.top_k >= 0, "a whole number, at least 0"),
            ("top_p", number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", number(self.min_p) and 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", number(penalty) and 0.01 <= penalty <= 100, "0.01 to 100"),
            ("seed", self.seed is None or (count(self.seed) and -(2**63) <= self.seed < 2**63), "a 64-bit whole number"),
            ("stop", all(isinstance(text, str) and text for text in self.stop), "texts that are not empty"),
            ("stop_token_ids", all(count(token) for token in self.stop_token_ids), "token ids"),
            (
                "logprobs",
                self.logprobs is None or (count(self.logprobs) and 0 <= self.logprobs <= _MAX_LOGPROBS),
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


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
