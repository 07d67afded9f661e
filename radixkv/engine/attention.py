"""Our attention under transformers' models.

transformers lets a model's attention be replaced by name; its layers then hand us query, key and value, and all else
(projections, rotary embedding, norms, MLP) stays the model's own. One forward pass carries the new tokens of many
requests in one row; a `Step` says which rows are whose:

    row       a a a a b c c        N tokens of three requests
    segments  [0,4) [4,5) [5,7)    each with its working view and its position in its sequence

Per layer: append the new keys and values to the view, then attend over the view's tokens [0, position + n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from radixkv.engine.cpu import causal_bias, decode_attention, prefill_attention
from radixkv.engine.view import WorkingView

__all__ = ["ATTENTION", "Segment", "Step"]

ATTENTION = "radixkv"
"""The name our attention is registered under."""


@dataclass(slots=True)
class Segment:
    """One request's new tokens in a step: rows [row, row + num_tokens), at `position` of its sequence."""

    view: WorkingView
    row: int
    num_tokens: int
    position: int


class Step:
    """What the attention layers of one forward pass share: the segments, and masks made once for all layers."""

    __slots__ = ("_masks", "num_layers", "segments")

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments
        self.num_layers = 0  # layers that have attended so far
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}

    def mask(self, segment: Segment, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
        """[n, position + n] added to the scores of a segment's tokens; None where `prefill_attention` needs none."""
        n, end = segment.num_tokens, segment.position + segment.num_tokens
        if n == end and (window is None or end <= window):
            return None
        key = (end, n, window)
        if key not in self._masks:
            self._masks[key] = causal_bias(n, end, like.dtype, window).to(like.device)
        return self._masks[key]


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    step: Step | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over every segment's working view.

    Args:
        module: the attention layer; its `layer_idx` chooses the view's layer.
        query: [1, Hq, N, D]; key, value: [1, H, N, D], rotated; H divides Hq.
        attention_mask: ignored; the step knows.
        scaling: of the scores; None is D ** -0.5.
        dropout: ignored; engines do not train.
        sliding_window: a token sees so many last tokens, itself included.
        softcap: refused (needs the score before the softmax).
        step: set by the runner.

    Returns:
        [1, N, Hq, D], and None for the weights.
    """
    assert step is not None, "models with this attention run through radixkv.engine only"
    if softcap is not None:
        raise NotImplementedError("attention with a soft cap is not supported")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    step.num_layers += 1
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    parts: list[torch.Tensor] = []  # [n, Hq, D] of each segment
    for segment in step.segments:
        rows = slice(segment.row, segment.row + segment.num_tokens)
        segment.view.append(layer, segment.position, key[0, :, rows], value[0, :, rows])
        keys, values = segment.view.kv[layer, :, :, : segment.position + segment.num_tokens]
        if segment.num_tokens == 1:
            parts.append(decode_attention(query[0, :, rows], keys, values, scale, sliding_window))
        else:
            mask = step.mask(segment, sliding_window, query)
            parts.append(prefill_attention(query[0, :, rows], keys, values, scale, mask, sliding_window))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


AttentionInterface.register(ATTENTION, _attend)
