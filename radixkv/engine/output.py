"""What the engine answers: chunks while it generates, a completion at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radixkv.engine.sampler import TokenLogprob

__all__ = ["Chunk", "Completion", "FinishReason"]

FinishReason = Literal["stop", "length", "cancelled"]
"""Why an answer ended: a stop text or token, max_tokens or the context's end, or its reader went away."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer. `cached_tokens + computed_tokens == prompt_tokens`, unless it was cancelled within its prompt.

    Attributes:
        text: the answer; empty when the engine has no tokenizer.
        token_ids: every generated token, the one that ended the answer included.
        finish_reason: why it ended.
        prompt_tokens: tokens of the prompt.
        cached_tokens: of those, how many were taken from the cache.
        computed_tokens: of those, how many went through the model.
        ttft_s: from the request to its first token.
        total_s: from the request to its last token.
        logprobs: one for each generated token, if asked for.
        written_tokens: of the computed ones, how many are cached from now on (whole pages).
        stopped_by: the stop text or token that ended it; None for the model's own end and for everything else.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    ttft_s: float
    total_s: float
    logprobs: tuple[TokenLogprob, ...] | None = None
    written_tokens: int = 0
    stopped_by: str | int | None = None

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens a second after the first one."""
        seconds = self.total_s - self.ttft_s
        return (len(self.token_ids) - 1) / seconds if seconds > 0 and len(self.token_ids) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """One step of a streamed answer: a token, the text it completes (often none), and at the end the completion.

    Attributes:
        text: what became certain to show.
        token_id: the token; None in the last chunk.
        completion: in the last chunk only.
        cached_tokens: prompt tokens taken from the cache: final, from the first chunk on.
        logprob: of the token, if asked for.
    """

    text: str
    token_id: int | None
    completion: Completion | None = None
    cached_tokens: int = 0
    logprob: TokenLogprob | None = None
