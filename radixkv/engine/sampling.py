"""How the tokens of one answer are chosen: checked once when made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from radixkv.engine.config import is_count, is_number
from radixkv.engine.structure import Structure
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
        presence_penalty: take this, -2 to 2, off the logits of tokens that the answer has.
        frequency_penalty: take this, -2 to 2, off the logits of tokens once for each time the answer has them.
        logit_bias: added to the logits of these tokens, -100 to 100; -100 forbids a token.
        min_tokens: before so many, no end-of-text token or stop token is chosen (a stop text still ends the answer). An
            answer with a structure ends when that is complete.
        structure: the form the answer is held to.
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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # compared, but a dict has no hash
    min_tokens: int = 0
    structure: Structure | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._normalise()
        for name, fits, expected in chain(self._number_limits(), self._form_limits()):  # later ones rely on earlier
            if not fits:
                raise ConfigError(name, getattr(self, name), expected)

    def _normalise(self) -> None:
        """Copy what was given as another kind of collection; the copies are this object's own."""
        stop: str | tuple[str, ...] = self.stop  # one text is taken for a list of one
        if not isinstance(stop, (str, list, tuple)):
            raise ConfigError("stop", stop, "texts that are not empty")
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        try:
            object.__setattr__(self, "stop_token_ids", frozenset(self.stop_token_ids))
        except TypeError:
            raise ConfigError("stop_token_ids", self.stop_token_ids, "token ids") from None
        if not isinstance(self.logit_bias, Mapping):
            raise ConfigError("logit_bias", self.logit_bias, "a mapping of token ids to numbers")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    def _number_limits(self) -> Iterator[tuple[str, bool, str]]:
        """(field, whether it fits, what would) of the plain numbers."""
        count, number, penalty = is_count, is_number, self.repetition_penalty
        yield "max_tokens", count(self.max_tokens) and self.max_tokens >= 0, "a whole number, at least 0"
        temperature = number(self.temperature) and (self.temperature == 0 or 1e-3 <= self.temperature <= 100)
        yield "temperature", temperature, "0, or 0.001 to 100"
        yield "top_k", count(self.top_k) and self.top_k >= 0, "a whole number, at least 0"
        yield "top_p", number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"
        yield "min_p", number(self.min_p) and 0 <= self.min_p <= 1, "0 to 1"
        yield "repetition_penalty", number(penalty) and 0.01 <= penalty <= 100, "0.01 to 100"
        yield "presence_penalty", number(self.presence_penalty) and -2 <= self.presence_penalty <= 2, "-2 to 2"
        yield "frequency_penalty", number(self.frequency_penalty) and -2 <= self.frequency_penalty <= 2, "-2 to 2"
        minimum = count(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens
        yield "min_tokens", minimum, f"a whole number, 0 to max_tokens, {self.max_tokens}"
        seed = self.seed is None or (count(self.seed) and -(2**63) <= self.seed < 2**63)
        yield "seed", seed, "a 64-bit whole number"
        logprobs = self.logprobs is None or (count(self.logprobs) and 0 <= self.logprobs <= _MAX_LOGPROBS)
        yield "logprobs", logprobs, f"0 to {_MAX_LOGPROBS}, or None"

    def _form_limits(self) -> Iterator[tuple[str, bool, str]]:
        """(field, whether it fits, what would) of the rest."""
        yield "stop", all(isinstance(text, str) and text for text in self.stop), "texts that are not empty"
        yield "stop_token_ids", all(is_count(token) for token in self.stop_token_ids), "token ids"
        tokens = all(is_count(token) and token >= 0 for token in self.logit_bias)
        yield "logit_bias", tokens, "a mapping whose keys are token ids, 0 or more"
        biases = all(is_number(bias) and -100 <= bias <= 100 for bias in self.logit_bias.values())
        yield "logit_bias", biases, "a mapping of token ids to numbers, -100 to 100"
        structure = self.structure is None or isinstance(self.structure, Structure)
        yield "structure", structure, "a Structure, or None"
        ends = self.structure is None or not self.ignore_eos
        yield "ignore_eos", ends, "False: an answer with a structure ends where the structure is complete"

    def require_vocabulary(self, vocab_size: int) -> None:
        """Check the token ids against a model.

        Args:
            vocab_size: how many logits the model gives.

        Raises:
            ConfigError: `logit_bias` names a token that the model has not.
        """
        highest = max(self.logit_bias, default=-1)
        if highest >= vocab_size:
            raise ConfigError("logit_bias", highest, f"token ids below {vocab_size}, what this model has")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_k == 1
