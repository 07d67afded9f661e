r"""Text to token ids and back, as the model was trained to see it; no torch of our own.

    Tokenizer   one model folder's tokenizer and chat template
    TextStream  ids one by one -> text that is safe to show: whole characters, never the head of a stop string

A conversation keeps the exact ids that were computed. The next turn is appended as ids of the *new* text only:

    ids kept:     ...<|im_start|>assistant\n Paris is ... <|im_end|>
    template:     ...<|im_start|>assistant\n SENTINEL     <|im_end|>\n<|im_start|>user\nAnd ...assistant\n
    turn_tail:                                                       \n<|im_start|>user\nAnd ...assistant\n

Re-tokenising the history would be wrong twice: the ids a model generates are often not those its text tokenises to,
so the cached prefix would end there; and it costs time that grows with the history.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from radixkv.errors import ChatTemplateMissing, EngineError, ModelCorrupt, ModelNotFound

__all__ = ["Ids", "Message", "TextStream", "Tokenizer"]

Ids = npt.NDArray[np.int32]
"""[T] int32 token ids."""
Message = Mapping[str, Any]
"""One chat message: {"role": ..., "content": ...} and what else the model's template reads."""

_SENTINEL = "radixkv7q3zreply"  # plain letters and digits: no template trims, escapes or parses them


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
        name: the model's name, for messages.
        backend: the tokenizers.Tokenizer underneath.
        eos_ids: ids that end an answer, of the generation config and of the tokenizer.
        has_chat_template: whether messages can be rendered.

    Thread safety: any thread may call anything; nothing changes after construction.

    Raises:
        ModelNotFound: the folder has no tokenizer.
        ModelCorrupt: its files cannot be read.
    """

    def __init__(self, folder: Path | str, name: str | None = None) -> None:
        folder = Path(folder)
        self.name = name or folder.name
        self._hf: Any = _load(folder)
        self.backend: tokenizers.Tokenizer = self._hf.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        # NOTE: `encode_special_tokens` is state of the backend; a second one keeps both ways safe to use at once.
        self._plain = tokenizers.Tokenizer.from_str(self.backend.to_str())
        self._plain.encode_special_tokens = True
        self.eos_ids: frozenset[int] = _eos_ids(folder, self._hf.eos_token_id)
        self._special: frozenset[int] = frozenset(
            token_id for token_id, token in self.backend.get_added_tokens_decoder().items() if token.special
        )
        self.has_chat_template: bool = bool(self._hf.chat_template)

    @property
    def vocab_size(self) -> int:
        """Ids are below this: the vocabulary and all added tokens."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True, bos: bool = True) -> Ids:
        """Tokenise a text.

        Cost:    about 0.3 us a character.

        Args:
            text: any text; a lone surrogate is read as "?", and what the vocabulary has no token for is left out.
            special: read "<|im_end|>" in the text as that token; if False, as the characters it is written with.
            bos: put in front what the tokenizer itself puts in front of a text (nothing for many models).

        Returns:
            [T] int32 ids, T >= 0.
        """
        clean = text.encode("utf-8", "replace").decode("utf-8")
        backend = self.backend if special else self._plain
        # A batch of one: it needs no offsets, and unlike `encode` it lets other threads run meanwhile.
        return np.array(backend.encode_batch_fast([clean], add_special_tokens=bos)[0].ids, dtype=np.int32)

    def decode(self, ids: Sequence[int] | npt.NDArray[Any], skip_special: bool = True) -> str:
        """Return the text of ids; bytes that are no character become U+FFFD.

        Args:
            ids: [T] ids.
            skip_special: leave special tokens out.
        """
        return self.backend.decode(np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens=skip_special)

    def chat_text(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, tools: Sequence[Any] | None = None
    ) -> str:
        """Render messages with the model's chat template.

        Args:
            messages: the conversation.
            add_generation_prompt: end where the assistant's answer begins.
            tools: functions or schemas that the template shows to the model.

        Raises:
            ChatTemplateMissing: the model has none.
            EngineError: the template refuses these messages.
        """
        if not self.has_chat_template:
            raise ChatTemplateMissing(self.name)
        try:
            text = self._hf.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # jinja raises what the template's author chose
            reason = f"the chat template of {self.name!r} refused the messages: {error}"
            raise EngineError(reason, model=self.name) from error
        return str(text)

    def chat_ids(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, tools: Sequence[Any] | None = None
    ) -> Ids:
        """Return the ids of `chat_text`; the template writes every special token itself."""
        return self.encode(self.chat_text(messages, add_generation_prompt, tools), bos=False)

    def turn_tail(
        self,
        messages: Sequence[Message],
        user_message: Message | Sequence[Message],
        last_ids: Sequence[int] | npt.NDArray[Any] = (),
        *,
        tools: Sequence[Any] | None = None,
    ) -> Ids:
        """Return the ids to append to a conversation's exact ids for its next turn.

        Cost:    one rendering of the messages; only the new text is tokenised.

        Args:
            messages: the history, with or without the last answer: its ids are kept, so its text is not read.
            user_message: what comes after the answer: one message, or several (results of tools).
            last_ids: the end of the ids kept, 8 are enough. An end-of-turn token that was generated and kept is not
                repeated.
            tools: as for `chat_text`.

        Raises:
            ChatTemplateMissing: the model has none.
            EngineError: the template refuses the messages, or does not show the answer in full.
        """
        following = [user_message] if isinstance(user_message, Mapping) else list(user_message)
        asked = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
        answer = {"role": "assistant", "content": _SENTINEL}
        before, found, tail = self.chat_text([*asked, answer, *following], tools=tools).rpartition(_SENTINEL)
        if not found or _SENTINEL in before:
            reason = f"the chat template of {self.name!r} does not show an answer as it is; render the whole conversation"
            raise EngineError(reason + " with chat_ids()", model=self.name)
        ids = self.encode(tail, bos=False)
        return ids[self._overlap(np.asarray(last_ids, dtype=np.int64).tolist(), ids.tolist()) :]

    def _overlap(self, kept: list[int], tail: list[int]) -> int:
        """How many of the tail's first ids `kept` ends with; 0 unless the first is special: text may repeat itself."""
        if not tail or tail[0] not in self._special | self.eos_ids:
            return 0
        longest = min(len(kept), len(tail))
        return next((n for n in range(longest, 0, -1) if kept[-n:] == tail[:n]), 0)


class TextStream:
    """Text of an answer while its ids arrive, shown only once it is certain.

    Held back: the bytes of a character that is not complete, and text that may become a stop string. Whatever way the
    ids split the text, `"".join(pushes) + flush()` is the text of all ids up to the first stop string to end.

    Args:
        tokenizer: of the model.
        stop: strings that end the answer; they are not part of it.
        skip_special: leave special tokens out.

    Attributes:
        stopped: the stop string that was met, or None.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._skip_special = skip_special
        self._decoder = DecodeStream(skip_special_tokens=skip_special)
        self._undecoded: list[int] = []
        self._held = ""
        self.stopped: str | None = None

    def push(self, token_id: int) -> str:
        """Take the next id; returns the text that became certain, often "".

        Cost:    a few microseconds, and the length of the stop strings.
        """
        if self.stopped is not None:
            return ""
        self._undecoded.append(int(token_id))
        try:
            text = self._decoder.step(self._tokenizer.backend, int(token_id))
        except Exception:  # tokenizers raises a bare Exception where decoding is not a growing prefix
            text = self._tokenizer.decode(self._undecoded, self._skip_special)
            self._decoder = DecodeStream(skip_special_tokens=self._skip_special)
        if text is None:
            return ""
        self._undecoded.clear()
        return self._certain(text)

    def flush(self) -> str:
        """Return what is still held back: the answer has ended."""
        if self.stopped is not None:
            return ""
        text = self._certain(self._tokenizer.decode(self._undecoded, self._skip_special))
        self._undecoded.clear()
        text, self._held = text + self._held, ""
        return text

    def _certain(self, text: str) -> str:
        self._held += text
        met = [(self._held.index(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in self._held]
        if met:
            end, _, self.stopped = min(met)  # the first to end, however the ids cut the text
            shown, self._held = self._held[: end - len(self.stopped)], ""
            return shown
        keep = max((_head_at_end(self._held, stop) for stop in self._stop), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown


def _head_at_end(text: str, stop: str) -> int:
    """How many last characters of `text` are the first ones of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _load(folder: Path) -> PreTrainedTokenizerBase:
    """Load tokenizer.json as it is; transformers' own classes rebuild it from parts, and lose digit splitting."""
    try:
        if (folder / "tokenizer.json").is_file():
            return _quietly(PreTrainedTokenizerFast, folder)
        if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
            raise ModelNotFound(str(folder), "the folder has no tokenizer.json")
        return _quietly(AutoTokenizer, folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelCorrupt(str(folder), f"its tokenizer cannot be read ({error})") from error
    except Exception as error:
        if type(error) is Exception:  # what the tokenizers library raises for a damaged file
            raise ModelCorrupt(str(folder / "tokenizer.json"), str(error)) from error
        raise


def _quietly(kind: Any, folder: Path) -> PreTrainedTokenizerBase:
    """Load without the remark that tokenizer_config.json names another class: that is meant."""
    logger = logging.getLogger("transformers.tokenization_utils_base")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    finally:
        logger.setLevel(before)


def _eos_ids(folder: Path, own: int | None) -> frozenset[int]:
    found = set() if own is None else {own}
    try:
        stated = json.loads((folder / "generation_config.json").read_text("utf-8")).get("eos_token_id")
    except (OSError, ValueError):
        stated = None
    found.update([stated] if isinstance(stated, int) else stated or [])
    return frozenset(found)
