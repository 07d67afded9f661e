"""The model runner: token ids of several requests in, logits out.

One forward pass of the transformers model a call, all requests' new tokens in one row. The runner knows views and
positions; it knows nothing of trees, leases or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from radixkv.engine.attention import Segment, Step
from radixkv.engine.support import SUPPORTED
from radixkv.engine.view import WorkingView
from radixkv.errors import UnsupportedModel

__all__ = ["ModelRunner", "Work"]


@dataclass(frozen=True, slots=True)
class Work:
    """One request's part of a forward pass.

    Attributes:
        view: its working view, filled up to `position`.
        tokens: [n] int32, its next tokens.
        position: tokens before them.
        wants_logits: whether the last one's logits are needed.
    """

    view: WorkingView
    tokens: npt.NDArray[np.int32]
    position: int
    wants_logits: bool


class ModelRunner:
    """Runs a transformers model whose attention is ours."""

    __slots__ = ("device", "model", "num_layers", "vocab_size")

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model = model
        self.device = device
        text_config = model.config.get_text_config()
        self.vocab_size = int(text_config.vocab_size)
        self.num_layers = int(text_config.num_hidden_layers)

    @torch.inference_mode()
    def forward(self, works: Sequence[Work]) -> torch.Tensor:
        """Compute the works' KV into their views.

        Cost: one pass over the weights, and attention over each work's context.

        Returns:
            [m, V] logits of the last token of each work that wants them, in order.

        Raises:
            UnsupportedModel: a layer keeps its KV elsewhere.
        """
        segments: list[Segment] = []
        last_rows: list[int] = []
        row = 0
        for work in works:
            segments.append(Segment(work.view, row, len(work.tokens), work.position))
            row += len(work.tokens)
            if work.wants_logits:
                last_rows.append(row - 1)
        ids = np.concatenate([work.tokens for work in works]).astype(np.int64)
        positions = np.concatenate([np.arange(work.position, work.position + len(work.tokens)) for work in works])
        step = Step(segments)
        output = self.model(
            input_ids=torch.from_numpy(ids)[None].to(self.device),
            position_ids=torch.from_numpy(positions)[None].to(self.device),
            attention_mask=None,
            use_cache=False,
            logits_to_keep=torch.tensor(last_rows, dtype=torch.long, device=self.device),
            step=step,
        )
        if step.num_layers != self.num_layers:
            reason = f"{type(self.model).__name__}, of whose {self.num_layers} layers {step.num_layers} attend through us"
            raise UnsupportedModel(type(self.model).__name__, reason, SUPPORTED)
        logits: torch.Tensor = output.logits[0]
        return logits
