"""From logits to the next token, for one request.

logits [V] ─ repetition penalty ─ temperature ─ top-k ─ top-p ─ min-p ─ draw
    └ log_softmax of the untouched logits ──▶ reported log probabilities
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from radixkv.engine.sampling import SamplingParams

__all__ = ["Sampler", "TokenLogprob"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token's log probability, and the likeliest tokens' in its place (token id -> log probability)."""

    token_id: int
    logprob: float
    top: dict[int, float]


class Sampler:
    """Draws the tokens of one answer. Independent of what else is in the batch.

    Args:
        params: how to choose.
        vocab_size: V.
        device: of the logits.
    """

    __slots__ = ("_generator", "_seen", "params")

    def __init__(self, params: SamplingParams, vocab_size: int, device: torch.device) -> None:
        self.params = params
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        penalised = params.repetition_penalty != 1
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device) if penalised else None

    def note(self, token_ids: torch.Tensor) -> None:
        """Tell of tokens [n] in the prompt, or just chosen, for the repetition penalty."""
        if self._seen is not None:
            self._seen[token_ids] = True

    def choose(self, logits: torch.Tensor) -> tuple[int, TokenLogprob | None]:
        """Pick a token from `logits` [V]. Cost: O(V), O(V log V) with top-p."""
        scores = logits.float()
        adjusted = scores if self._seen is None else self._penalise(scores, self._seen)
        token_id = int(adjusted.argmax() if self.params.greedy else self._draw(adjusted))
        if self._seen is not None:
            self._seen[token_id] = True
        return token_id, None if self.params.logprobs is None else self._report(scores, token_id)

    def _penalise(self, scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        penalty = self.params.repetition_penalty
        return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        params = self.params
        scores = scores / params.temperature
        if 0 < params.top_k < scores.numel():
            threshold = scores.topk(params.top_k).values[-1]
            scores = scores.masked_fill(scores < threshold, float("-inf"))
        if params.top_p < 1:
            ordered, index = scores.softmax(-1).sort(descending=True)
            drop = ordered.cumsum(-1) - ordered >= params.top_p  # the first token that reaches top_p stays
            scores = scores.masked_fill(torch.zeros_like(drop).scatter(0, index, drop), float("-inf"))
        probabilities = scores.softmax(-1)
        if params.min_p > 0:
            probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0)
        return torch.multinomial(probabilities, 1, generator=self._generator)

    def _report(self, scores: torch.Tensor, token_id: int) -> TokenLogprob:
        logprobs = scores.log_softmax(-1)
        values, index = logprobs.topk(self.params.logprobs or 0)
        return TokenLogprob(token_id, float(logprobs[token_id]), dict(zip(index.tolist(), values.tolist(), strict=True)))
