"""A finished answer as the token ids that the next turn shows the model.

generated   <think> Hm </think> Paris . Observ ation          stop text "Observation"
ids         <think> Hm </think> Paris .                       what its reader was given, thinking included
spoken                          Paris .                       what is left where the template drops thinking
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from radixkv.engine.thinking import THINK, ThinkingTags, num_thinking_tokens, spoken_start, spoken_text
from radixkv.engine.tokenizer import Tokenizer
from radixkv.tokens import Tokens

if TYPE_CHECKING:
    from radixkv.engine.output import Completion

__all__ = ["ExactAnswer", "exact_answer"]


@dataclass(frozen=True, slots=True)
class ExactAnswer:
    """An assistant's message as the ids it was generated as.

    Attributes:
        ids: [T] all of it.
        spoken: of those, what is left without the thinking; `ids` itself if there is none.
        num_thinking: of the ids, how many are thinking: the first ones.
    """

    ids: Tokens
    spoken: Tokens
    num_thinking: int


def exact_answer(
    tokenizer: Tokenizer, completion: Completion, tags: ThinkingTags = THINK, *, opened: bool = False
) -> ExactAnswer:
    """What to keep of a completion.

    A stop text or stop token that ended it is left out: its reader never saw it, and would send it once more.

    Cost:    one decoding of the answer; where it has thinking or a stop text some more.

    Args:
        tokenizer: of the model.
        completion: the answer.
        tags: the texts around its thinking.
        opened: the prompt ended with the opening tag.
    """
    ids = _without_stop(tokenizer, completion)
    decode = partial(tokenizer.decode, skip_special=False)
    stop = num_thinking_tokens(ids, decode, tags, opened=opened)
    exact = Tokens(ids)
    return ExactAnswer(exact, _spoken(tokenizer, ids, stop, tags) if stop else exact, stop)


def _without_stop(tokenizer: Tokenizer, completion: Completion) -> list[int]:
    ids = list(completion.token_ids)
    if not isinstance(completion.stopped_by, str):
        return ids[:-1] if ids and ids[-1] == completion.stopped_by else ids
    while ids and not completion.text.startswith(tokenizer.decode(ids)):
        ids.pop()
    rest = completion.text[len(tokenizer.decode(ids)) :]  # of a token inside which the stop text begins
    return ids + tokenizer.encode(rest, special=False, bos=False).tolist()


def _spoken(tokenizer: Tokenizer, ids: Sequence[int], stop: int, tags: ThinkingTags) -> Tokens:
    decode = partial(tokenizer.decode, skip_special=False)
    whole = decode(ids)
    if tags.closing not in whole:
        return Tokens()
    text = spoken_text(whole, tags, opened=True)
    kept = ids[spoken_start(ids, decode, stop) :]
    return Tokens(kept if decode(kept) == text else tokenizer.encode(text, bos=False))  # or a token spans the border
