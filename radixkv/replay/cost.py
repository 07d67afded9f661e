"""What a hit rate is worth: prefill FLOPs, seconds and GPU-hours not spent.

A token of the prompt costs, in a decoder with L layers, model width d, Hq query and H KV heads of size D, MLP width f:

    linear       2 L (d Hq D + 2 d H D + Hq D d + 3 d f)      a multiply and an add for each weight it meets
    attention    4 L Hq D  for each key at or before it       scores, and the weighted sum of values

so the token at position p costs linear + (p + 1) attention: deep tokens are dearer, and the beginning of a prompt is
worth less than its share of tokens. The output head, which works on the last token only, embeddings and norms are left
out (below 1 %).

Seconds are FLOPs / (peak x utilisation). Peaks are dense bf16 from the data sheets. The utilisation is assumed: 0.5,
between eager transformers' 45 % and compiled transformers' 57 % on an H100 (4,096 tokens of an 8B shape in 139 and
109 ms, measured).
"""

from __future__ import annotations

from dataclasses import dataclass

from radixkv.errors import ConfigError
from radixkv.replay.rows import Row

__all__ = ["GPUS", "SHAPES", "UTILISATION", "Gpu", "ModelShape", "Saving", "named_gpu", "named_shape", "saving"]

UTILISATION = 0.5
"""Assumed share of a GPU's peak that prefill reaches."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder's sizes.

    Attributes:
        num_layers, width, num_heads, num_kv_heads, head_dim, mlp_width: L, d, Hq, H, D and f above.
        kv_value_bytes: of one key or value number, 2 for bf16.
    """

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    kv_value_bytes: int = 2

    @property
    def linear_flops(self) -> int:
        """FLOPs of one token in the weights."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        return 2 * self.num_layers * self.width * (heads * self.head_dim + 3 * self.mlp_width)

    @property
    def attention_flops(self) -> int:
        """FLOPs of one (query, key) pair."""
        return 4 * self.num_layers * self.num_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_value_bytes

    def prefill_flops(self, num_tokens: int, num_pairs: int) -> int:
        """FLOPs of `num_tokens` tokens that look at `num_pairs` keys in all."""
        return num_tokens * self.linear_flops + num_pairs * self.attention_flops


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's dense bf16 peak, TFLOP/s, and where that is stated."""

    peak_tflops: float
    source: str

    def seconds(self, flops: int, utilisation: float = UTILISATION) -> float:
        """How long `flops` take at that share of the peak.

        Raises:
            ConfigError: a utilisation outside (0, 1].
        """
        if not 0 < utilisation <= 1:
            raise ConfigError("utilisation", utilisation, "above 0, at most 1")
        return flops / (self.peak_tflops * 1e12 * utilisation)


SHAPES: dict[str, ModelShape] = {
    "llama-3.1-8b": ModelShape(32, 4096, 32, 8, 128, 14336),
    "llama-3.1-70b": ModelShape(80, 8192, 64, 8, 128, 28672),
    "llama-3.2-1b": ModelShape(16, 2048, 32, 8, 64, 8192),
    "llama-3.2-3b": ModelShape(28, 3072, 24, 8, 128, 8192),
    "mistral-7b": ModelShape(32, 4096, 32, 8, 128, 14336),
    "qwen3-0.6b": ModelShape(28, 1024, 16, 8, 128, 3072),
    "qwen3-4b": ModelShape(36, 2560, 32, 8, 128, 9728),
    "qwen3-8b": ModelShape(36, 4096, 32, 8, 128, 12288),
    "qwen3-14b": ModelShape(40, 5120, 40, 8, 128, 17408),
    "qwen3-32b": ModelShape(64, 5120, 64, 8, 128, 25600),
    "smollm2-135m": ModelShape(30, 576, 9, 3, 64, 1536),
    "smollm2-1.7b": ModelShape(24, 2048, 32, 32, 64, 8192),
}
"""Model shapes by name. Source: each model's config.json (Meta, Mistral v0.3, Qwen, HuggingFaceTB)."""

GPUS: dict[str, Gpu] = {
    "a100": Gpu(312.0, "NVIDIA A100 data sheet, SXM and PCIe"),
    "b200": Gpu(2250.0, "NVIDIA HGX B200 data sheet, half of the figure with sparsity"),
    "h100": Gpu(989.4, "NVIDIA H100 data sheet, SXM, half of the figure with sparsity"),
    "h200": Gpu(989.4, "NVIDIA H200 data sheet, SXM, half of the figure with sparsity"),
    "l4": Gpu(121.0, "NVIDIA L4 data sheet, half of the figure with sparsity"),
    "l40s": Gpu(362.05, "NVIDIA L40S data sheet"),
}
"""GPUs by name."""


@dataclass(frozen=True, slots=True)
class Saving:
    """What one row's hits were worth.

    Attributes:
        flops: prefill FLOPs not computed.
        share: of the prefill FLOPs without a cache.
        gpu_seconds: `flops` at the GPU's peak x the utilisation.
    """

    flops: int
    share: float
    gpu_seconds: float

    @property
    def gpu_hours(self) -> float:
        """`gpu_seconds` in hours."""
        return self.gpu_seconds / 3600


def saving(row: Row, shape: ModelShape, gpu: Gpu, utilisation: float = UTILISATION) -> Saving:
    """What `row`'s hits save on a model and a GPU.

    Raises:
        ConfigError: a utilisation outside (0, 1].
    """
    flops = shape.prefill_flops(row.hit_tokens, row.hit_pairs)
    total = shape.prefill_flops(row.input_tokens, row.input_pairs)
    return Saving(flops, flops / total if total else 0.0, gpu.seconds(flops, utilisation))


def named_shape(name: str) -> ModelShape:
    """The shape called `name`; a ConfigError that lists the names if there is none."""
    if name not in SHAPES:
        raise ConfigError("model", name, f"one of {', '.join(sorted(SHAPES))}")
    return SHAPES[name]


def named_gpu(name: str) -> Gpu:
    """The GPU called `name`; a ConfigError that lists the names if there is none."""
    if name not in GPUS:
        raise ConfigError("gpu", name, f"one of {', '.join(sorted(GPUS))}")
    return GPUS[name]
