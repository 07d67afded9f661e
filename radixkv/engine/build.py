"""Putting an engine together: files to model, model to page shape, memory to pages."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from radixkv.cache import PrefixCache
from radixkv.engine import models
from radixkv.engine.attention import ATTENTION
from radixkv.engine.compiling import fuse_projections
from radixkv.engine.config import EngineConfig
from radixkv.engine.cpu import best_cpu_dtype, prepare_for_cpu
from radixkv.engine.paged import PagedRunner
from radixkv.engine.residence import InPages, InViews, Residence
from radixkv.engine.runner import ModelRunner
from radixkv.engine.tokenizer import Tokenizer
from radixkv.errors import ConfigError
from radixkv.store.device import DeviceStore, PageShape, pages_that_fit

__all__ = ["EngineParts", "build", "build_random"]

log = logging.getLogger("radixkv.engine")

_CPU_FRACTION, _CUDA_FRACTION = 0.25, 0.85
_IDLE_CONTEXTS, _IDLE_SHARE = 2, 0.25  # idle working views hold at most so many contexts, and this share of the pool


@dataclass(frozen=True, slots=True)
class EngineParts:
    """Everything an engine is made of."""

    name: str
    config: EngineConfig
    residence: Residence
    store: DeviceStore
    cache: PrefixCache
    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    max_context: int


def build(name: str, config: EngineConfig) -> EngineParts:
    """Load a model and put an engine around it."""
    device, dtype = _device(config), _dtype(config)
    config = config.resolved(device.type)
    _set_threads(config)
    in_pages = _in_pages(config, device)
    folder = models.resolve_model(name, in_pages=in_pages)
    tokenizer = Tokenizer(folder.path)
    model = models.load_model(folder, dtype=dtype, device=device, attn_implementation=ATTENTION, in_pages=in_pages)
    fingerprint = models.fingerprint(folder, dtype=dtype, extra=_variant(config))
    with _current(device):
        return _assemble(name, config, model, device, dtype, fingerprint, tokenizer)


def build_random(model_config: Any, seed: int, config: EngineConfig, tokenizer: Tokenizer | None = None) -> EngineParts:
    """Make a model of random weights and put an engine around it."""
    device, dtype = _device(config), _dtype(config)
    config = config.resolved(device.type)
    _set_threads(config)
    model, fingerprint = models.random_model(
        model_config,
        dtype=dtype,
        device=device,
        attn_implementation=ATTENTION,
        seed=seed,
        extra=_variant(config),
        in_pages=_in_pages(config, device),
    )
    with _current(device):
        return _assemble(f"random {model_config.model_type}", config, model, device, dtype, fingerprint, tokenizer)


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _assemble(
    name: str,
    config: EngineConfig,
    model: PreTrainedModel,
    device: torch.device,
    dtype: torch.dtype,
    fingerprint: str,
    tokenizer: Tokenizer | None,
) -> EngineParts:
    text_config = model.config.get_text_config()
    shape = PageShape(
        num_layers=text_config.num_hidden_layers,
        page_size=config.page_size,
        num_kv_heads=getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads,
        head_dim=getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads,
        dtype=dtype,
    )
    if device.type == "cpu":
        for note in prepare_for_cpu(model, weights=config.weights):
            log.info("cpu: %s", note)
    elif config.weights != "native":
        raise ConfigError("weights", config.weights, "native on a GPU")
    else:
        for note in fuse_projections(model):
            log.info("cuda: %s", note)
        torch.cuda.empty_cache()  # what held the parts, before the pool takes its share of what is free
    free_bytes = _free_bytes(device)
    default = _CPU_FRACTION if device.type == "cpu" else _CUDA_FRACTION
    fraction = default if config.pool_fraction is None else config.pool_fraction
    num_pages = pages_that_fit(
        shape, num_pages=config.num_pages, num_bytes=config.pool_bytes, fraction=fraction, free_bytes=free_bytes
    )
    longest = int(getattr(text_config, "max_position_embeddings", 0)) or num_pages * config.page_size
    if config.max_context is not None and config.max_context > longest:
        raise ConfigError("max_context", config.max_context, f"at most {longest}, what the model was made for")
    eos = tokenizer.eos_ids if tokenizer is not None else models.eos_ids(model)
    log.info("%s: %d pages of %d tokens, %.2f GB", name, num_pages, config.page_size, num_pages * shape.page_bytes / 1e9)
    store = DeviceStore(shape, num_pages, device)
    cache = PrefixCache(num_pages, config.page_size, policy=config.policy, fingerprint=fingerprint)
    context = config.max_context or longest
    return EngineParts(
        name=name,
        config=config,
        residence=_residence(config, model, store, cache, context),
        store=store,
        cache=cache,
        tokenizer=tokenizer,
        eos_ids=eos,
        max_context=context,
    )


def _residence(
    config: EngineConfig, model: PreTrainedModel, store: DeviceStore, cache: PrefixCache, max_context: int
) -> Residence:
    """Where running requests keep their KV: in the pages where kernels read them in place, else in views."""
    device = store.kv.device
    if _in_pages(config, device):
        graphs, compiled = (wanted and device.type == "cuda" for wanted in (config.graphs, config.compile))
        return InPages(PagedRunner(model, store, device, graphs=graphs, compile=compiled), store)
    max_idle = min(_IDLE_CONTEXTS * max_context, int(store.num_pages * config.page_size * _IDLE_SHARE))
    return InViews(ModelRunner(model, device), store, cache, max_idle)


def _in_pages(config: EngineConfig, device: torch.device) -> bool:
    return device.type == "cuda" if config.attention == "auto" else config.attention == "pages"


def _variant(config: EngineConfig) -> str:
    """What, besides the model, makes one page's bytes differ from another's."""
    exact = f"exact {config.exact_block}" if config.exact else "any split"
    return f"page {config.page_size}, weights {config.weights}, {exact}"


def _device(config: EngineConfig) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError("device", config.device, "auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError("device", config.device, "auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", config.device, "cpu: no CUDA device is visible")
    return device


def _dtype(config: EngineConfig) -> torch.dtype:
    if config.dtype != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[config.dtype]
    return torch.bfloat16 if _device(config).type == "cuda" else best_cpu_dtype()


def _set_threads(config: EngineConfig) -> None:
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
