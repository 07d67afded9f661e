"""From logits to the next token, for one request.

logits [V] ─ repetition ─ presence, frequency ─ logit bias ─ min_tokens ─ structure ─ temperature, top-k, top-p, min-p ─ draw
    │        (prompt, answer)   (answer)       (-100: never) (no end yet) (its form)
    └ log_softmax of the untouched logits ──▶ reported log probabilities

What forbids comes after what weighs, so no penalty brings a forbidden token back; what cuts the tail comes last, so it
keeps its share of tokens that are possible.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch

from radixkv.engine.sampling import SamplingParams
from radixkv.engine.structure import Matcher
from radixkv.errors import StructureError

__all__ = ["Sampler", "TokenLogprob"]

_NEVER = float("-inf")


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
        end_ids: tokens that end the answer; `min_tokens` holds them back.
        matcher: follows the answer through `params.structure`, if it has one.
    """

    __slots__ = ("_bias", "_chosen", "_counts", "_ends", "_generator", "_matcher", "_seen", "params")

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        device: torch.device,
        *,
        end_ids: AbstractSet[int] = frozenset(),
        matcher: Matcher | None = None,
    ) -> None:
        assert (matcher is None) == (params.structure is None)
        self.params = params
        self._matcher = matcher
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        penalised = params.repetition_penalty != 1
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device) if penalised else None
        counted = params.presence_penalty != 0 or params.frequency_penalty != 0
        self._counts = torch.zeros(vocab_size, device=device) if counted else None
        self._bias = _bias(params, vocab_size, device)
        ends = [token_id for token_id in sorted(end_ids) if 0 <= token_id < vocab_size] if params.min_tokens else []
        self._ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self._chosen = 0

    @property
    def accepting(self) -> bool:
        """Whether the answer so far has its whole form; True where it has none to keep."""
        return self._matcher is None or self._matcher.accepting

    def note(self, token_ids: torch.Tensor) -> None:
        """Tell of tokens [n] in the prompt, for the repetition penalty."""
        if self._seen is not None:
            self._seen[token_ids] = True

    def choose(self, logits: torch.Tensor) -> tuple[int, TokenLogprob | None]:
        """Pick a token from `logits` [V].

        Cost:    O(V), O(V log V) with top-p.

        Raises:
            StructureError: the structure leaves no token, or none that `logit_bias` does not forbid.
        """
        scores = logits.float()
        adjusted = self._forbid(self._weigh(scores))
        token_id = int(adjusted.argmax() if self.params.greedy else self._draw(adjusted))
        self._advance(token_id)
        return token_id, None if self.params.logprobs is None else self._report(scores, token_id)

    def _advance(self, token_id: int) -> None:
        self._chosen += 1
        if self._seen is not None:
            self._seen[token_id] = True
        if self._counts is not None:
            self._counts[token_id] += 1
        if self._matcher is not None:
            self._matcher.advance(token_id)

    def _weigh(self, scores: torch.Tensor) -> torch.Tensor:
        """Make tokens likelier or less likely."""
        params = self.params
        if self._seen is not None:
            penalty = params.repetition_penalty
            scores = torch.where(self._seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
        if self._counts is not None:
            scores = scores - params.frequency_penalty * self._counts - params.presence_penalty * (self._counts > 0)
        return scores if self._bias is None else scores + self._bias

    def _forbid(self, scores: torch.Tensor) -> torch.Tensor:
        """Take out what must not come next; a form that is complete may end, however few tokens it took."""
        if self._chosen < self.params.min_tokens and not (self._matcher is not None and self._matcher.complete):
            scores = scores.index_fill(0, self._ends, _NEVER)
        if self._matcher is not None:
            allowed = torch.zeros(scores.numel(), dtype=torch.bool)
            mask = torch.from_numpy(self._matcher.allowed())[: scores.numel()]  # a model may have more ids, or fewer
            allowed[: mask.numel()] = mask
            scores = scores.masked_fill(~allowed.to(scores.device), _NEVER)
            if bool(scores.max() == _NEVER):
                reason = "no token is left that logit_bias and min_tokens do not forbid; ask for less of them"
                raise StructureError("the answer's form", reason)
        return scores

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        params = self.params
        scores = scores / params.temperature
        if 0 < params.top_k < scores.numel():
            threshold = scores.topk(params.top_k).values[-1]
            scores = scores.masked_fill(scores < threshold, _NEVER)
        if params.top_p < 1:
            ordered, index = scores.softmax(-1).sort(descending=True)
            drop = ordered.cumsum(-1) - ordered >= params.top_p  # the first token that reaches top_p stays
            scores = scores.masked_fill(torch.zeros_like(drop).scatter(0, index, drop), _NEVER)
        probabilities = scores.softmax(-1)
        if params.min_p > 0:
            probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0)
        return torch.multinomial(probabilities, 1, generator=self._generator)

    def _report(self, scores: torch.Tensor, token_id: int) -> TokenLogprob:
        logprobs = scores.log_softmax(-1)
        values, index = logprobs.topk(self.params.logprobs or 0)
        return TokenLogprob(token_id, float(logprobs[token_id]), dict(zip(index.tolist(), values.tolist(), strict=True)))


def _bias(params: SamplingParams, vocab_size: int, device: torch.device) -> torch.Tensor | None:
    """What `logit_bias` adds to each logit [V]."""
    if not params.logit_bias:
        return None
    params.require_vocabulary(vocab_size)
    bias = torch.zeros(vocab_size)
    for token_id, value in params.logit_bias.items():
        bias[token_id] = _NEVER if value == -100 else value
    return bias.to(device)
