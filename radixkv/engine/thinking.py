r"""Where the thinking of an answer ends, in token ids and in text; pure functions.

    ids    <think> \n Hm, ... \n </think> \n\n Paris . <|im_end|>
           [0 ------- thinking ------- stop)[-- spoken: without the line ends in front --)

Templates of thinking models show an answer's thinking only until the user speaks again. Only what was spoken is shown
from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from radixkv.errors import ConfigError

__all__ = ["THINK", "ThinkingTags", "num_thinking_tokens", "spoken_start", "spoken_text"]

LINE_ENDS: Final = "\r\n"


@dataclass(frozen=True, slots=True)
class ThinkingTags:
    """The texts around an answer's thinking.

    Attributes:
        opening: in front of it; some templates write it themselves, at the end of the prompt.
        closing: behind it.

    Raises:
        ConfigError: one of them is empty.
    """

    opening: str = "<think>"
    closing: str = "</think>"

    def __post_init__(self) -> None:
        for name in ("opening", "closing"):
            if not getattr(self, name):
                raise ConfigError(name, getattr(self, name), "a text that is not empty")


THINK: Final = ThinkingTags()


def num_thinking_tokens(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], tags: ThinkingTags = THINK, *, opened: bool = False
) -> int:
    """How many of an answer's first ids are its thinking, the tags included.

    Cost:    one decoding, and where there is thinking O(log T) more.

    Args:
        ids: [T] generated ids.
        decode: ids to text, special tokens included; the tags need not be tokens of their own.
        tags: the texts around the thinking.
        opened: the prompt ended with the opening tag, so the ids begin inside.

    Returns:
        0 to T; T where the thinking was cut before its end. A token that holds the tag's end and more counts as thinking.
    """
    text = decode(ids)
    if not opened and not text.lstrip().startswith(tags.opening):
        return 0
    if tags.closing not in text:
        return len(ids)
    low, high = 0, len(ids)  # decode(ids[:low]) lacks the closing tag, decode(ids[:high]) has it
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if tags.closing in decode(ids[:middle]) else (middle, high)
    return high


def spoken_start(ids: Sequence[int], decode: Callable[[Sequence[int]], str], stop: int) -> int:
    """The first of `ids[stop:]` that is more than line ends: templates drop those behind the thinking."""
    while stop < len(ids) and not (text := decode(ids[stop : stop + 1])).strip(LINE_ENDS) and text:
        stop += 1
    return stop


def spoken_text(text: str, tags: ThinkingTags = THINK, *, opened: bool = False) -> str:
    r"""An answer's text without its thinking and the line ends behind it; as it is if it has none.

    >>> spoken_text("<think>Hm.</think>\n\nParis.")
    'Paris.'
    >>> spoken_text("Paris."), spoken_text("<think>Hm")
    ('Paris.', '')
    """
    begins = text.lstrip().startswith(tags.opening)
    if tags.closing in text and (begins or opened):
        return text.partition(tags.closing)[2].lstrip(LINE_ENDS)
    return "" if begins else text
