"""Fewer, larger operators for a decoder on a GPU: products that share an input become one, and layers are compiled.

Both change a model in place and leave its answers as they are, up to rounding. All decoder layers are alike, so one
compilation serves them all, and takes a fraction of what the whole model would.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from radixkv.engine.cuda import DryStep, attending

__all__ = [
    "LayerCall",
    "compile_layers",
    "decoder_layers",
    "fuse_projections",
    "layer_calls",
    "use_compiled",
    "use_original",
]

log = logging.getLogger("radixkv.engine")


def fuse_projections(model: nn.Module) -> list[str]:
    """Compute q, k and v as one product, and gate and up as one, where they are plain linear layers on one input.

    Cost: one copy of these weights; each layer's old ones are freed as it goes. Mutates: `model`.

    Returns:
        What was done, one plain sentence each.
    """
    done: Counter[str] = Counter()
    with torch.inference_mode(False), torch.no_grad():
        for parent in list(model.modules()):
            _fuse_qkv(parent, done)
            for name, child in list(parent.named_children()):
                fused = _gated_mlp(child)
                if fused is not None:
                    setattr(parent, name, fused.eval())
                    done["gated MLPs compute gate and up as one product"] += 1
    return [f"{count} {note}" for note, count in done.items()]


class _Fused(nn.Module):
    """Several linear layers on the same input; outputs lie side by side. [.., K] -> [.., sum N]."""

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__()
        self.widths = [part.out_features for part in parts]
        self.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]), requires_grad=False)
        biases = [part.bias for part in parts]
        self.bias = None if biases[0] is None else nn.Parameter(torch.cat(biases), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class _First(nn.Module):
    """Stands for q_proj: computes q, k and v, hands back q and keeps the rest for the modules asked next."""

    def __init__(self, fused: _Fused) -> None:
        super().__init__()
        self.fused = fused
        self.kept: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.fused(x).split(self.fused.widths, -1)
        self.kept = (x, parts)
        return parts[0]


class _Rest(nn.Module):
    """Stands for k_proj or v_proj: its part of the product just made of the same input object, else computed anew."""

    def __init__(self, first: _First, index: int) -> None:
        super().__init__()
        self._shared, self.index = (first,), index  # a tuple, so that it is not registered as a child
        self.is_last = index == len(first.fused.widths) - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (first,) = self._shared
        kept = first.kept  # one read: another thread may replace it, its input then is another object
        if kept is None or kept[0] is not x:
            return first.fused(x).split(first.fused.widths, -1)[self.index]
        if self.is_last:
            first.kept = None
        return kept[1][self.index]


class _GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) with gate and up as one product."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up = _Fused([mlp.gate_proj, mlp.up_proj])
        self.down_proj, self.act_fn = mlp.down_proj, mlp.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down_proj(self.act_fn(gate) * up)


def _fuse_qkv(parent: Any, done: Counter[str]) -> None:
    parts: list[Any] = [getattr(parent, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if not _same_input(parts):
        return
    first = _First(_Fused(parts))
    parent.q_proj = first.eval()
    parent.k_proj, parent.v_proj = _Rest(first, 1).eval(), _Rest(first, 2).eval()
    done["attention layers compute q, k and v as one product"] += 1


def _gated_mlp(module: Any) -> _GatedMlp | None:
    linear = {name for name, child in module.named_children() if type(child) is nn.Linear}
    if linear != {"gate_proj", "up_proj", "down_proj"} or not callable(getattr(module, "act_fn", None)):
        return None
    if not _same_input([module.gate_proj, module.up_proj]):
        return None
    fused = _GatedMlp(module)
    weight = module.gate_proj.weight
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    return fused if all(_agree(module, fused, x * scale) for scale in (1, 64)) else None  # some clamp what is large


def _agree(module: Any, fused: _GatedMlp, x: torch.Tensor) -> bool:
    """Whether both give the same, up to the dtype's rounding."""
    want, got = module(x), fused(x)
    return want.shape == got.shape and bool((want - got).abs().max() <= 16 * torch.finfo(x.dtype).eps * want.abs().max())


def _same_input(parts: Sequence[Any]) -> bool:
    if any(type(part) is not nn.Linear for part in parts):
        return False
    return len({(part.in_features, part.weight.dtype, part.bias is None) for part in parts}) == 1


def decoder_layers(model: nn.Module, num_layers: int) -> list[nn.Module]:
    """The model's decoder layers, each with one attention; empty where they are not in one list."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            own = [sum(hasattr(m, "is_causal") and hasattr(m, "layer_idx") for m in layer.modules()) for layer in module]
            if own == [1] * num_layers:
                return list(module)
    return []


LayerCall = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A layer, and what it is called with."""


def layer_calls(layers: Sequence[nn.Module], run: Callable[[], object]) -> list[LayerCall]:
    """How the layers are called while `run` runs the model. Nobody else may run it meanwhile."""
    seen: list[LayerCall] = []

    def note(layer: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((layer, args, kwargs))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def compile_layers(calls: Sequence[LayerCall], *, backend: str | Callable[..., Any] = "inductor") -> bool:
    """Compile what the layers have in common; they go on as they were until `use_compiled`.

    Cost: seconds to minutes the first time, less from inductor's cache later. To be called in inference mode.

    Args:
        calls: of layers of one class. Any number of rows is compiled at once, but one row apart: give calls of both.
        backend: of torch.compile.

    Returns:
        Whether it worked; if not, the log says why.
    """
    if len({type(layer) for layer, _, _ in calls}) != 1:
        log.warning("not compiled: the decoder layers are not of one kind")
        return False
    compiled = torch.compile(type(calls[0][0]).forward, dynamic=True, fullgraph=True, backend=backend)
    try:
        for layer, args, kwargs in calls:
            with attending(DryStep()):
                compiled(layer, *args, **kwargs)
    except Exception as error:  # whatever a compiler may raise: the engine can do without it
        reason = " ".join(str(error).split("\n")[:2])
        log.warning("not compiled, the layers run as they are: %s: %s", type(error).__name__, reason)
        return False
    return True


def use_compiled(layers: Sequence[nn.Module]) -> None:
    """Let the layers run what was compiled, where it fits their inputs; else they run as they were. Compiles nothing."""
    run = torch._dynamo.run(type(layers[0]).forward)
    for layer in layers:
        layer.forward = MethodType(run, layer)


def use_original(layers: Sequence[nn.Module]) -> None:
    """Undo `use_compiled`."""
    for layer in layers:
        vars(layer).pop("forward", None)
