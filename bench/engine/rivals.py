"""What a user has without radixkv: transformers, with no cache, or with a cache kept by hand.

`none`     every prompt is computed whole
`session`  one DynamicCache a session, grown from turn to turn: nothing is shared between sessions
`copied`   as `session`, and a session's first prompt starts from a copy of the shared head's cache

All run transformers' own SDPA attention and its own greedy loop over the forward pass.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from radixkv.engine.models import resolve_model


@dataclass(slots=True)
class Answer:
    """One answer of any engine."""

    token_ids: list[int]
    ttft_s: float
    total_s: float
    computed_tokens: int


class Transformers:
    """Greedy generation with transformers and a cache kept by hand."""

    def __init__(self, dtype: torch.dtype, keep: str) -> None:
        self.keep = keep
        path = str(resolve_model("smollm2").path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()
        self._kept: dict[object, tuple[np.ndarray, DynamicCache]] = {}

    @torch.inference_mode()
    def answer(self, key: object, prompt: np.ndarray, num_tokens: int, shared: int) -> Answer:
        """Answer `prompt`; `key` names the session, `shared` the length of the head common to all prompts."""
        start = time.perf_counter()
        self._head_tokens = 0  # of a shared head computed on the way
        cache, computed = self._find(key, prompt, shared)
        first = True
        ids: list[int] = []
        feed = torch.from_numpy(prompt[computed:].astype(np.int64))[None]
        while len(ids) < num_tokens:
            logits = self.model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            ids.append(int(logits.argmax()))
            if first:
                ttft, first = time.perf_counter() - start, False
            feed = torch.tensor([[ids[-1]]])
        if self.keep != "none":
            self._kept[key] = (np.concatenate([prompt, np.array(ids[:-1], np.int32)]), cache)
        return Answer(ids, ttft, time.perf_counter() - start, len(prompt) - computed + self._head_tokens)

    def _find(self, key: object, prompt: np.ndarray, shared: int) -> tuple[DynamicCache, int]:
        if key in self._kept:
            tokens, cache = self._kept[key]
            if len(tokens) < len(prompt) and np.array_equal(tokens, prompt[: len(tokens)]):
                return cache, len(tokens)
        if self.keep == "copied":
            head = prompt[:shared].tobytes()
            if head not in self._kept:
                cache = DynamicCache(config=self.model.config)
                self.model(torch.from_numpy(prompt[:shared].astype(np.int64))[None], past_key_values=cache, logits_to_keep=1)
                self._kept[head] = (prompt[:shared], cache)
                self._head_tokens = shared
            return copy.deepcopy(self._kept[head][1]), shared
        return DynamicCache(config=self.model.config), 0
