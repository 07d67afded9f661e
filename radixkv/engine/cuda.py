"""Our attention over pages, under transformers' models.

The new tokens of many requests go through the model in one row of N. Each layer writes their keys and values into the page
store and attends over the pages, as a `PagedStep` says:

    row       a a a a b c c  ·     N rows of three requests, and one of padding
    slots     5 6 7 8 3 9 10 -1    where each row's KV goes; padding goes nowhere
    spans     a@20 b@112 c@0       who they are: page table, position, number of new tokens

A layer knows its part of the page store (`attach_store`), and nothing else of all this: what a step is changes with each
step, so it waits beside the model, one a thread (`attending`), and not among the arguments. A layer that was compiled once
then fits every step and every layer, and its attention is one operator that nobody looks into.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from radixkv.store.device import DeviceStore
from radixkv_kernels.attention import attend, attend_ref
from radixkv_kernels.device_plan import DevicePlan, upload
from radixkv_kernels.planning import Geometry, Span, plan
from radixkv_kernels.writes import write_kv

__all__ = [
    "PAGED_ATTENTION",
    "DryStep",
    "PagedStep",
    "Scoring",
    "attach_store",
    "attending",
    "attentions",
    "detach_store",
    "geometry_of",
    "narrowed",
]

log = logging.getLogger("radixkv.engine")

PAGED_ATTENTION = "radixkv_paged"
"""The name our attention over pages is registered under."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer's scores become weights.

    Attributes:
        scale: of the scores.
        window: tokens that a token sees, itself included; 0 for all.
        soft_cap: bound of the scores; 0 for none.
        sinks: [Hq] one more score for each head; None for none.
    """

    scale: float
    window: int
    soft_cap: float
    sinks: torch.Tensor | None


class PagedStep:
    """What the attention layers of one forward pass share.

    Args:
        slots: [N] int64 on the device; -1 for rows of padding.
        spans: of the requests, in the order of their rows.
        geometry: for the kernels' plans; None where they cannot run: the references do.
        plans: those made already, by window (0 is none); others are made and uploaded when a layer first asks.

    Attributes:
        num_layers: layers that have attended so far.
        windows: what they asked for.
    """

    __slots__ = ("_geometry", "_plans", "num_layers", "slots", "spans", "windows")

    def __init__(
        self,
        slots: torch.Tensor,
        spans: Sequence[Span],
        geometry: Geometry | None,
        plans: Mapping[int, DevicePlan] | None = None,
    ) -> None:
        self.slots = slots
        self.spans = spans
        self.num_layers = 0
        self.windows: set[int] = set()
        self._geometry = geometry
        self._plans = dict(plans or {})

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """Write one layer's new KV, and attend. query [N, Hq, D], key and value [N, H, D], kv [P, 2, S, H, D].

        Returns:
            [N, Hq, D], contiguous; rows of padding hold anything.
        """
        self.num_layers += 1
        self.windows.add(scoring.window)
        write_kv(key, value, kv, self.slots)
        options: dict[str, Any] = {
            "scale": scoring.scale,
            "window": scoring.window or None,
            "soft_cap": scoring.soft_cap or None,
            "sinks": scoring.sinks,
        }
        if self._geometry is not None:
            return attend(query, kv, self._plan(scoring.window, query.device), **options)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        rows = sum(span.num_tokens for span in self.spans)
        out[:rows] = attend_ref(query[:rows], kv, tuple(self.spans), **options)
        return out

    def _plan(self, window: int, device: torch.device) -> DevicePlan:
        if window not in self._plans:
            assert self._geometry is not None
            work = plan(self.spans, self._geometry, window=narrowed(window, self.spans))
            self._plans[window] = upload(work, self._geometry, device)
        return self._plans[window]


class DryStep:
    """A step of nothing: no layer writes or reads a page. For looking at a model, and for compiling it."""

    __slots__ = ("num_layers", "windows")

    def __init__(self) -> None:
        self.num_layers = 0
        self.windows: set[int] = set()

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """Zeros [N, Hq, D]."""
        self.num_layers += 1
        self.windows.add(scoring.window)
        return torch.zeros(query.shape, dtype=query.dtype, device=query.device)


class _Current(threading.local):
    step: PagedStep | DryStep | None = None


_current = _Current()


@contextmanager
def attending(step: PagedStep | DryStep) -> Iterator[None]:
    """Within, this thread's forward passes belong to `step`."""
    before, _current.step = _current.step, step
    try:
        yield
    finally:
        _current.step = before


def narrowed(window: int, spans: Sequence[Span]) -> int | None:
    """The window to plan for: None where no request is longer than it, as then prefixes can be read once for all."""
    return window if window and any(span.end > window for span in spans) else None


def geometry_of(model: nn.Module, store: DeviceStore) -> Geometry | None:
    """What the kernels' plans are made for; None, and one line in the log, where the kernels cannot take this shape."""
    shape, device = store.shape, store.kv.device
    num_heads = int(model.config.get_text_config().num_attention_heads)  # type: ignore[operator, union-attr]
    wide: dict[str, int] = {}
    if device.type == "cuda":
        wide["num_processors"] = torch.cuda.get_device_properties(device).multi_processor_count
        if shape.dtype == torch.float32:  # three products for one: larger tiles would not fit
            wide["wide"] = 64 if shape.head_dim <= 128 else 32
    try:
        return Geometry(num_heads, shape.num_kv_heads, shape.head_dim, shape.page_size, **wide)
    except ValueError as error:
        log.warning("attention runs in plain PyTorch, many times slower: %s", error)
        return None


def attentions(model: nn.Module) -> list[nn.Module]:
    """The model's attention layers, in order."""
    found = [m for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "layer_idx")]
    return sorted(found, key=lambda layer: int(layer.layer_idx))  # type: ignore[arg-type]


def attach_store(model: nn.Module, store: DeviceStore) -> None:
    """Give each attention layer its part of the page store. A model serves one store at a time."""
    for layer in attentions(model):
        # NOTE: the layer's own number is not read while it runs, else it would have to be compiled for each layer.
        layer.radixkv_kv = store.kv[:, int(layer.layer_idx)]  # type: ignore[arg-type]


def detach_store(model: nn.Module) -> None:
    """Take the page store from the layers again, so that its memory can be given back."""
    for layer in attentions(model):
        if hasattr(layer, "radixkv_kv"):
            del layer.radixkv_kv


@torch.library.custom_op(
    "radixkv::paged_attention",
    mutates_args=("kv",),
    schema="(Tensor query, Tensor key, Tensor value, Tensor(a!) kv, Tensor? sinks, float scale, int window, float soft_cap)"
    " -> Tensor",
)
def _paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int,
    soft_cap: float,
) -> torch.Tensor:
    """Take query [1, Hq, N, D], key and value [1, H, N, D] ; give [1, N, Hq, D], contiguous."""
    step = _current.step
    assert step is not None, "models with this attention run through PagedRunner only"
    scoring = Scoring(scale, window, soft_cap, sinks)
    return step.attend(_by_row(query), _by_row(key), _by_row(value), kv, scoring).unsqueeze(0)


@_paged_attention.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    one, num_heads, num_rows, head_dim = query.shape
    return query.new_empty(one, num_rows, num_heads, head_dim)


def _by_row(x: torch.Tensor) -> torch.Tensor:
    """[1, H, N, D] -> [N, H, D], D contiguous; no copy where it is already."""
    rows = x[0].transpose(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers asks for it; mask and dropout are ignored, the step knows.

    Args:
        module: the attention layer, with its part of the page store.
        query: [1, Hq, N, D]; key, value: [1, H, N, D], rotated; H divides Hq.
        attention_mask: ignored.
        scaling: of the scores; None is D ** -0.5.
        dropout: ignored.
        sliding_window: a token sees so many last tokens, itself included.
        softcap: bound of the scores.
        s_aux: [Hq] attention sinks.

    Returns:
        [1, N, Hq, D], and None for the weights.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = torch.ops.radixkv.paged_attention(
        query, key, value, module.radixkv_kv, s_aux, scale, sliding_window or 0, softcap or 0.0
    )
    return out, None


AttentionInterface.register(PAGED_ATTENTION, _attend)
