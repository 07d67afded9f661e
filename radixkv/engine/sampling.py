"""How the tokens of one answer are chosen: checked once when made."""

from __future__ import annotations

from dataclasses import dataclass, field

from radixkv.engine.config import is_count, is_number
from radixkv.errors import ConfigError

__all__ = ["SamplingParams"]

_MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one answer are chosen. The defaults are greedy.

    Attributes:
        max_tokens: at most so many; 0 computes the prompt only, which warms the cache.
        temperature: 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities sum to at least this.
        min_p: drop tokens less likely than this share of the likeliest one.
        repetition_penalty: divide (or, below zero, multiply) the logits of tokens seen in prompt or answer by this.
        seed: makes a sampled answer repeatable; None draws one.
        stop: texts that end the answer; they are not part of it.
        stop_token_ids: tokens that end the answer, besides the model's own end-of-text tokens.
        ignore_eos: go on past the model's own end-of-text tokens.
        logprobs: report the log probability of each token and of this many likeliest ones; None reports none.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop: str | tuple[str, ...] = self.stop  # one text is taken for a list of one
        if not isinstance(stop, (str, list, tuple)):
            raise ConfigError("stop", stop, "texts that are not empty")
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        try:
            object.__setattr__(self, "stop_token_ids", frozenset(self.stop_token_ids))
        except TypeError:
            raise ConfigError("stop_token_ids", self.stop_token_ids, "token ids") from None
        count, number, penalty = is_count, is_number, self.repetition_penalty
        limits: list[tuple[str, bool, str]] = [
            ("max_tokens", count(self.max_tokens) and self.max_tokens >= 0, "a whole number, at least 0"),
            (
                "temperature",
                number(self.temperature) and (self.temperature == 0 or 1e-3 <= self.temperature <= 100),
                "0, or 0.001 to 100",
            ),
            ("top_k", count(self.top_k) and self.top_k >= 0, "a whole number, at least 0"),
            ("top_p", number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", number(self.min_p) and 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", number(penalty) and 0.01 <= penalty <= 100, "0.01 to 100"),
            ("seed", self.seed is None or (count(self.seed) and -(2**63) <= self.seed < 2**63), "a 64-bit whole number"),
            ("stop", all(isinstance(text, str) and text for text in self.stop), "texts that are not empty"),
            ("stop_token_ids", all(count(token) for token in self.stop_token_ids), "token ids"),
            (
                "logprobs",
                self.logprobs is None or (count(self.logprobs) and 0 <= self.logprobs <= _MAX_LOGPROBS),
                f"0 to {_MAX_LOGPROBS}, or None",
            ),
        ]
        for name, fits, expected in limits:
            if not fits:
                raise ConfigError(name, getattr(self, name), expected)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_k == 1
