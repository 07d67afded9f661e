"""Settings of the engine, checked once when they are made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Literal

from radixkv.errors import ConfigError
from radixkv.policies import POLICIES

__all__ = ["EngineConfig", "is_count", "is_number"]

_STEP_TOKENS = {"cpu": (2048, 512), "cuda": (8192, 4096)}  # by device: alone, and where somebody decodes


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
        prefill_chunk: tokens of a step in which nobody decodes; a last chunk of a prompt may be half as long again. None is
            2,048 on a CPU and 8,192 on a GPU.
        mixed_tokens: tokens of a step in which somebody decodes: fewer let everybody's next token come sooner. None is 512
            on a CPU and 4,096 on a GPU.
        max_running: requests that run together.
        max_waiting: requests that a server lets wait for a place; one more is refused with `QueueFull`.
        cache: reuse prefixes. Off, nothing is looked up or kept.
        exact: make a hit answer bit for bit as a miss: prefill in blocks of `exact_block` tokens at fixed positions, reuse
            whole blocks, decode each request alone. Slower; see docs/design/0006-exact.md.
        exact_block: tokens in such a block, a multiple of `page_size`.
        policy: the eviction policy.
        weights: "native", or "int8" weights on a CPU: half the memory traffic, and answers that differ a little.
        num_threads: CPU threads; None is what torch finds.
        attention: "pages" reads and writes pages in place, with kernels on a GPU; "views" gives each running request a
            contiguous copy, which is faster on a CPU; "auto" is pages on a GPU.
        graphs: replay small steps as CUDA graphs.
        compile: let `Engine.warm_up` compile the decoder layers for a GPU.
    """

    page_size: int = 16
    num_pages: int | None = None
    pool_bytes: int | None = None
    pool_fraction: float | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"
    max_context: int | None = None
    prefill_chunk: int | None = None
    mixed_tokens: int | None = None
    max_running: int = 16
    max_waiting: int = 256
    cache: bool = True
    exact: bool = False
    exact_block: int = 128
    policy: str = "lru"
    weights: Literal["native", "int8"] = "native"
    num_threads: int | None = None
    attention: Literal["auto", "pages", "views"] = "auto"
    graphs: bool = True
    compile: bool = True

    def __post_init__(self) -> None:
        for name in ("page_size", "max_running", "max_waiting", "exact_block"):
            if not (is_count(getattr(self, name)) and getattr(self, name) >= 1):
                raise ConfigError(name, getattr(self, name), "a whole number, at least 1")
        for name in ("num_pages", "pool_bytes", "prefill_chunk", "mixed_tokens", "max_context", "num_threads"):
            value = getattr(self, name)
            if value is not None and not (is_count(value) and value >= 1):
                raise ConfigError(name, value, "a whole number, at least 1, or None")
        if self.page_size & (self.page_size - 1):
            raise ConfigError("page_size", self.page_size, "a power of two, such as 16")
        if self.pool_fraction is not None and not (is_number(self.pool_fraction) and 0 < self.pool_fraction <= 1):
            raise ConfigError("pool_fraction", self.pool_fraction, "above 0 and at most 1, or None")
        if self.exact and self.exact_block % self.page_size:
            raise ConfigError("exact_block", self.exact_block, f"a multiple of page_size, {self.page_size}")
        if self.dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise ConfigError("dtype", self.dtype, "auto, float32, float16 or bfloat16")
        if self.weights not in ("native", "int8"):
            raise ConfigError("weights", self.weights, "native or int8")
        if self.attention not in ("auto", "pages", "views"):
            raise ConfigError("attention", self.attention, "auto, pages or views")
        if self.policy not in POLICIES:
            raise ConfigError("policy", self.policy, f"one of {', '.join(sorted(POLICIES))}")

    def resolved(self, device_type: str) -> EngineConfig:
        """The same with what is left to the device filled in."""
        chunk, mixed = _STEP_TOKENS[device_type]
        chunk = self.prefill_chunk if self.prefill_chunk is not None else chunk
        return replace(self, prefill_chunk=chunk, mixed_tokens=min(self.mixed_tokens or mixed, chunk))


def is_count(value: object) -> bool:
    """Whether it is a whole number, a boolean not counted."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a real number, a boolean not counted."""
    return isinstance(value, Real) and not isinstance(value, bool)
