"""From a rendered conversation with places for answers to its token ids, and from characters to tokens.

text    piece ......... [cut) piece .......... [cut) piece ...
ids     [ encoded alone |ids| encoded alone    |ids| encoded alone ]
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock

from radixkv.engine.tokenizer import Tokenizer
from radixkv.prefix import TOKEN_BYTES, common_prefix_bytes
from radixkv.tokens import Tokens

__all__ = ["ChatPrompt", "Cut", "Layout", "Pieces", "common_characters"]

_TAIL = 8  # the template's end of a turn, which an answer may have ended with, is shorter
_SPACES = " \n\t\r"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation's token ids, up to where the assistant's next answer begins.

    Attributes:
        ids: [T] the prompt.
        spliced: indexes of the messages that stand in it as the ids they were generated as.
        marks: for each mark asked for, how many of the ids every conversation begins with that is the same up to the mark; a
            word or so less than the mark's place, for what follows may change how the last word is tokenised. 0 where the
            template does not show the mark.
    """

    ids: Tokens
    spliced: tuple[int, ...] = ()
    marks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Cut:
    """Characters [start, stop) of a rendered text stand for an answer's ids; `lead` belongs to the piece before."""

    index: int
    start: int
    stop: int
    ids: Tokens
    lead: str = ""


class Pieces:
    """The ids of texts tokenised lately: at most `max_tokens` of them, least recently used ones leave first.

    Thread safety: any thread may call anything.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._kept: OrderedDict[bytes, Tokens] = OrderedDict()
        self._lock = Lock()

    def encode(self, text: str, namespace: bytes) -> Tokens:
        """The ids of a text. Nothing of one namespace is found, or timed, from another."""
        key = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32, key=namespace).digest()
        with self._lock:
            ids = self._kept.get(key)
            if ids is not None:
                self._kept.move_to_end(key)
                return ids
        ids = Tokens(self._tokenizer.encode(text, bos=False))
        with self._lock:
            if key not in self._kept:
                self._kept[key] = ids
                self._num_tokens += len(ids) + _TAIL
            while self._num_tokens > self._max_tokens:
                self._num_tokens -= len(self._kept.popitem(last=False)[1]) + _TAIL
        return ids


@dataclass(frozen=True, slots=True)
class _Span:
    """Characters [first, last) of the text are tokens [start, stop) of the ids; of a piece, `skipped` ids were left out."""

    first: int
    last: int
    start: int
    stop: int
    skipped: int = 0
    piece: Tokens | None = None


class Layout:
    """The ids of a text with cuts.

    Attributes:
        ids: [T] all of them.
    """

    def __init__(self, tokenizer: Tokenizer, pieces: Pieces, namespace: bytes, text: str, cuts: Sequence[Cut]) -> None:
        self._tokenizer = tokenizer
        self._pieces = pieces
        self._namespace = namespace
        self._text = text
        self._spans: list[_Span] = []
        data, at = bytearray(), 0
        for cut in cuts:
            self._add_piece(data, at, cut.start, cut.lead)
            before, at = len(data) // TOKEN_BYTES, cut.stop
            data += cut.ids.data
            self._spans.append(_Span(cut.start, cut.stop, before, len(data) // TOKEN_BYTES))
        self._add_piece(data, at, len(text), "")
        self.ids = Tokens(bytes(data))

    def _add_piece(self, data: bytearray, first: int, last: int, lead: str) -> None:
        """Add a piece, once the end that the answer before it wrote has given way to the end that the template writes."""
        piece = self._pieces.encode(self._text[first:last] + lead, self._namespace)
        tail = Tokens(bytes(data[-_TAIL * TOKEN_BYTES :])).tolist()
        skipped = self._tokenizer._overlap(tail, piece[:_TAIL].tolist())
        answer = self._spans[-1] if self._spans else None
        if not skipped and answer is not None and answer.stop > answer.start and tail[-1] in self._tokenizer.eos_ids:
            del data[-TOKEN_BYTES:]
            self._spans[-1] = _Span(answer.first, answer.last, answer.start, answer.stop - 1)
        start = len(data) // TOKEN_BYTES
        data += piece.data[skipped * TOKEN_BYTES :]
        self._spans.append(_Span(first, last, start, len(data) // TOKEN_BYTES, skipped, piece))

    def settled_tokens(self, place: int) -> int:
        """How many ids are the same for every text that begins with the first `place` characters of this one."""
        span = next((span for span in reversed(self._spans) if span.first < place), None)
        if span is None:
            return 0
        if place >= span.last:
            return span.stop
        if span.piece is None:
            return span.start
        words = self._text[span.first : place].rstrip(_SPACES)
        settled = words[: max(map(words.rfind, _SPACES)) + 1].rstrip(_SPACES)
        head = self._pieces.encode(settled, self._namespace)
        return max(span.start, span.start + common_prefix_bytes(head.data, 0, span.piece.data) // TOKEN_BYTES - span.skipped)


def common_characters(left: str, right: str) -> int:
    """How many first characters two texts share."""
    wide = "utf-32-le"
    return common_prefix_bytes(left.encode(wide, "surrogatepass"), 0, right.encode(wide, "surrogatepass")) // 4
