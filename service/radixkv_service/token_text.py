"""Single tokens as text and bytes, for log probabilities: a token may be a part of a character."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, final

from tokenizers.pre_tokenizers import ByteLevel

from radixkv_service.openai_answers import CompletionLogprobs, LikelyToken, TokenDetail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from radixkv.engine.sampler import TokenLogprob
    from radixkv.engine.tokenizer import Tokenizer

__all__ = ["TokenTexts", "byte_alphabet"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """The byte that each letter of byte-level vocabularies stands for.

    Letters below 256 stand for themselves; the others, in order, for the bytes that are left.
    """
    letters = sorted(ByteLevel.alphabet())
    plain = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    left = sorted(set(range(256)) - set(plain.values()))
    return plain | dict(zip((letter for letter in letters if ord(letter) >= 256), left, strict=True))


@final
class TokenTexts:
    """What each token id says.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_level = "ByteLevel" in repr(tokenizer.backend.decoder)
        self._added = frozenset(tokenizer.backend.get_added_tokens_decoder())
        self._known: dict[int, tuple[str, list[int]]] = {}

    def __call__(self, token_id: int) -> tuple[str, list[int]]:
        """Its text, with U+FFFD for what is no character alone, and its bytes."""
        if token_id not in self._known:
            data = self._bytes(token_id)
            self._known[token_id] = (data.decode("utf-8", "replace"), list(data))
        return self._known[token_id]

    def _bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.backend.id_to_token(token_id)
        if piece is None:  # the model's vocabulary may be larger than the tokenizer's
            return b""
        if token_id in self._added:
            return piece.encode()
        if self._byte_level:
            alphabet = byte_alphabet()
            return bytes(alphabet[letter] for letter in piece) if all(c in alphabet for c in piece) else piece.encode()
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()

    def chat(self, logprobs: Sequence[TokenLogprob]) -> list[TokenDetail]:
        """Log probabilities in the form of chat completions."""
        return [self._detail(one) for one in logprobs]

    def _detail(self, one: TokenLogprob) -> TokenDetail:
        text, data = self(one.token_id)
        likely = [self._likely(token_id, value) for token_id, value in one.top.items()]
        return TokenDetail(token=text, logprob=_finite(one.logprob), bytes=data, top_logprobs=likely)

    def _likely(self, token_id: int, logprob: float) -> LikelyToken:
        text, data = self(token_id)
        return LikelyToken(token=text, logprob=_finite(logprob), bytes=data)

    def completion(self, logprobs: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs:
        """Log probabilities in the form of completions; `offset` characters come before the first token."""
        tokens = [self(one.token_id)[0] for one in logprobs]
        offsets = [offset]
        for token in tokens:
            offsets.append(offsets[-1] + len(token))
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[_finite(one.logprob) for one in logprobs],
            top_logprobs=[
                {self(token_id)[0]: _finite(value) for token_id, value in one.top.items()} or None for one in logprobs
            ],
            text_offset=offsets[:-1],
        )


def _finite(logprob: float) -> float:
    """JSON has no infinity; -9999.0 is what OpenAI sends instead."""
    return max(logprob, -9999.0)
