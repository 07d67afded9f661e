"""Whether a contestant is right: sampled rows against float64, before anything is timed."""

from __future__ import annotations

import math

import numpy as np
import torch

from bench.kernels.cases import Inputs
from bench.kernels.contestants import Contestant

__all__ = ["TOLERANCE", "Wrong", "require_right"]

TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 2e-5}
"""Norm of the error by the norm of the right output, for one row and head: room for rounding, not for a forgotten tile."""

_ROWS = 8


class Wrong(Exception):
    """A contestant's output is not the attention of its inputs.

    Attributes:
        name, case: which contestant, on what.
        error, tolerance: the worst relative error, infinite where an output is not a number, and what is allowed.
    """

    def __init__(self, name: str, case: str, error: float, tolerance: float) -> None:
        self.name, self.case, self.error, self.tolerance = name, case, error, tolerance
        super().__init__(f"{name} on {case!r}: relative error {error:.3g} where {tolerance:.3g} is allowed; not timed")


def require_right(contestant: Contestant, inputs: Inputs, seed: int) -> float:
    """Run a contestant into an output of NaN and compare rows of the first and the last layer with float64.

    Returns:
        The worst relative error.

    Raises:
        Wrong: it is above the tolerance, or not every output was written.
    """
    tolerance, worst = TOLERANCE[inputs.shape.dtype], 0.0
    for layer in (0, inputs.cycle - 1):
        inputs.out.fill_(float("nan"))
        found = contestant.act(layer)
        error = _error(found, inputs, layer, seed) if bool(torch.isfinite(found).all()) else math.inf
        worst = max(worst, error)
    if not worst <= tolerance:
        raise Wrong(contestant.name, inputs.case.name, worst, tolerance)
    return worst


def _error(found: torch.Tensor, inputs: Inputs, layer: int, seed: int) -> float:
    rows = len(found)
    some = np.random.default_rng(seed).integers(0, rows, _ROWS)
    errors: list[float] = []
    for row in sorted({0, rows - 1, *some.tolist()}):
        right = _attention(inputs, layer, row)
        errors.append(float(((found[row].double() - right).norm(dim=-1) / right.norm(dim=-1)).max()))
    return max(errors)


def _attention(inputs: Inputs, layer: int, row: int) -> torch.Tensor:
    """[Hq, D] one row in float64."""
    shape, case = inputs.shape, inputs.case
    span = inputs.spans[row // case.new]
    seen = span.position + row % case.new + 1
    pages = torch.from_numpy(span.pages[: -(-seen // shape.page_size)]).long().to(inputs.kv.device)
    keys, values = inputs.kv[pages, layer].transpose(0, 1).flatten(1, 2)[:, :seen].double()  # [C, H, D] each
    query = inputs.query[layer, row].double().view(shape.num_kv_heads, -1, shape.head_dim)
    weights = (torch.einsum("hgd,chd->hgc", query, keys) * inputs.scale).softmax(-1)
    return torch.einsum("hgc,chd->hgd", weights, values).flatten(0, 1)
