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

__all__ = ["Pick", "Sampler", "TokenLogprob"]

_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token's log probability, and the likeliest tokens' in its place (token id -> log probability)."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True, slots=True)
class Pick:
    """A token that a device has picked or is about to.

    Attributes:
        token: [1] int64.
        report: its log probability [1], and the likeliest tokens' [k] with their ids [k]; None where nobody asked.
    """

    token: torch.Tensor
    report: tuple[torch.Tensor, ...] | None


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
        self._ends = torch.tensor(ends, dtype=torch.int64)
        if ends:
            self._ends = self._ends.to(device)
        self._chosen = 0

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token and nothing else matters: many such rows are one argmax."""
        nothing = self._seen is None and self._counts is None and self._bias is None and self._matcher is None
        return nothing and self.params.greedy and not self._ends.numel() and self.params.logprobs is None

    @property
    def accepting(self) -> bool:
        """Whether the answer so far has its whole form; True where it has none to keep."""
        return self._matcher is None or self._matcher.accepting

    def note(self, token_ids: torch.Tensor) -> None:
        """Tell of tokens [n] in the prompt, for the repetition penalty."""
        if self._seen is not None:
            self._seen[token_ids.to(self._seen.device)] = True

    def choose(self, logits: torch.Tensor) -> tuple[int, TokenLogprob | None]:
        """Pick a token from `logits` [V], and read which it is.

        Cost:    O(V), O(V log V) with top-p.

        Raises:
            StructureError: the structure leaves no token, or none that `logit_bias` does not forbid.
        """
        return self.read(self.pick(logits))

    def pick(self, logits: torch.Tensor) -> Pick:
        """Pick a token from `logits` [V]; a device is told to, and not waited for, unless there is a structure to keep.

        Raises:
            StructureError: as `choose`.
        """
        scores = logits.float()
        adjusted = self._forbid(self._weigh(scores))
        token = (adjusted.argmax() if self.params.greedy else self._draw(adjusted)).reshape(1)
        self._chosen += 1
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        return Pick(token, None if self.params.logprobs is None else self._report(scores, token))

    def read(self, pick: Pick, token_id: int | None = None) -> tuple[int, TokenLogprob | None]:
        """Follow the answer's structure with a pick.

        Args:
            pick: from `pick`.
            token_id: its token, if it is known; None waits for the device to have picked it.
        """
        token_id = int(pick.token) if token_id is None else token_id
        if self._matcher is not None:
            self._matcher.advance(token_id)
        if pick.report is None:
            return token_id, None
        own, values, index = (part.tolist() for part in pick.report)
        return token_id, TokenLogprob(token_id, own[0], dict(zip(index, values, strict=True)))

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
        # As torch.multinomial does it for one draw, whose checks would wait for the device.
        race = torch.empty_like(probabilities).exponential_(1, generator=self._generator)
        return (probabilities / race).argmax()

    def _report(self, scores: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logprobs = scores.log_softmax(-1)
        return logprobs[token], *logprobs.topk(self.params.logprobs or 0)


def _bias(params: SamplingParams, vocab_size: int, device: torch.device) -> torch.Tensor | None:
    """What `logit_bias` adds to each logit [V]."""
    if not params.logit_bias:
        return None
    params.require_vocabulary(vocab_size)
    bias = torch.zeros(vocab_size)
    for token_id, value in params.logit_bias.items():
        bias[token_id] = _NEVER if value == -100 else value
    return bias.to(device)
