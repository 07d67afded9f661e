"""What no prompt can be: a request that is far too long is refused by its size, before it is rendered and tokenised.

    text, messages, ids ── at least so many tokens ──▶ more than fit? refused ──▶ else: render, tokenise, count exactly

Tokenising takes time that grows with the text, and nobody else is answered quickly meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from radixkv_service.errors import Problem, ProblemError
from radixkv_service.service import Service

if TYPE_CHECKING:
    from radixkv.engine.tokenizer import Tokenizer

__all__ = ["COUNTED", "longest_token_bytes", "refuse_long_ids", "refuse_long_messages", "refuse_long_text"]

COUNTED = 4
"""Contexts of ids that are written out as text; a text that is only counted has room enough, tokens being mostly short."""


@lru_cache(maxsize=4)
def longest_token_bytes(tokenizer: Tokenizer) -> int:
    """How many bytes of UTF-8 the longest token of a vocabulary stands for, at least 1.

    Cost: O(vocabulary) once; not for the event loop.

    >>> from radixkv.engine import Engine
    >>> longest_token_bytes(Engine("smollm2").tokenizer)  # a line end and 80 spaces
    81
    """
    backend = tokenizer.backend
    added = [len(token.content.encode("utf-8", "replace")) for token in backend.get_added_tokens_decoder().values()]
    plain = backend.get_vocab(with_added_tokens=False)
    if "ByteLevel" in repr(backend.decoder):  # one letter for one byte
        return max(1, *added, *map(len, plain))
    return max(1, *added, *(len(token.encode("utf-8", "replace")) for token in plain))


def refuse_long_ids(service: Service, num_ids: int, param: str, *, contexts: int = 1) -> None:
    """Refuse ids that are too many.

    Args:
        service: knows what fits.
        num_ids: how many there are.
        param: the field they came in.
        contexts: at most so many times what the context and the pool hold.

    Raises:
        ProblemError: 400, context_length_exceeded.
    """
    _refuse(service, num_ids, f"{num_ids} tokens", param, contexts)


def refuse_long_text(service: Service, text: str, param: str) -> None:
    """Refuse a text whose bytes are more tokens than fit, however it is cut. As `refuse_long_ids`."""
    _refuse_bytes(service, _num_bytes(text), 0, param)


def refuse_long_messages(
    service: Service, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Refuse messages whose texts, calls and tools are more tokens than fit. As `refuse_long_ids`.

    Args:
        service: knows what fits.
        messages: in OpenAI's form; a template writes at least a token of its own for each.
        tools: in OpenAI's form.
    """
    said = _num_bytes([(message.get("content"), message.get("tool_calls")) for message in messages]) + _num_bytes(tools)
    _refuse_bytes(service, said, len(messages), "messages")
    # Many templates leave out the thinking of earlier turns, so it has a limit of its own.
    thought = _num_bytes([message.get("reasoning_content") for message in messages])
    _refuse_bytes(service, thought, 0, "messages")


def _refuse_bytes(service: Service, num_bytes: int, num_messages: int, param: str) -> None:
    longest = longest_token_bytes(service.engine.tokenizer)
    least = max(num_bytes // longest, num_messages)
    what = f"{num_messages} messages" if least == num_messages else f"{num_bytes} bytes of text"
    _refuse(service, least, f"{what} are at least {least} tokens", param)


def _refuse(service: Service, num_tokens: int, what: str, param: str, contexts: int = 1) -> None:
    limit = contexts * service.max_tokens
    if num_tokens > limit:
        message = f"{param}: {what}, and at most {limit} are read here; send less, or use a model with a longer context"
        raise ProblemError(Problem(400, "invalid_request_error", message, param, "context_length_exceeded"))


def _num_bytes(value: object) -> int:
    """The bytes of all texts in a value, names of fields included."""
    total = 0
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            total += len(one) if one.isascii() else len(one.encode("utf-8", "replace"))
        elif isinstance(one, Mapping):
            left += [*one, *one.values()]
        elif isinstance(one, (list, tuple)):
            left += one
    return total
