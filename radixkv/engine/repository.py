"""Questions about a source tree whose files are computed once.

    [ template's head | file 1 | file 2 | ... | file n | question, in the template's tail ]
      the same always   rarely changed ... often         another every time

A question computes itself and nothing else. After an edit the first changed file is computed again and what stands
behind it, which is little: what changes often stands last (radixkv/repository/packing.py).

What is asked and how it is run are two things. `prompt` and `computed` are all that another way of running needs:

    changed = repository.refresh()                    in any thread
    packing = repository.packing                      one moment's files; later refreshes leave it as it is
    answer  = run(repository.prompt(question, packing))
    costs   = repository.computed(answer.cached_tokens, packing)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from radixkv.engine.output import Chunk, Completion
from radixkv.engine.sampling import SamplingParams
from radixkv.errors import EngineError, RepositoryError
from radixkv.namespace import Namespace
from radixkv.repository import Packing, Shelf, Skipped, SourceFile, list_files, read_history
from radixkv.tokens import Tokens

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine

__all__ = ["FileCost", "Repository", "RepositoryAnswer"]

_RESERVED = 1024  # tokens of the context left for a question and its answer, unless a budget is given
_MARK = "\ue000files\ue000"  # stands for the files while the template is rendered
_INTRODUCTION = "Answer questions about these source files.\n"  # no name of the folder: worktrees share it


@dataclass(frozen=True, slots=True)
class FileCost:
    """What a file cost: of its `num_tokens` tokens, `computed_tokens` went through the model."""

    path: str
    num_tokens: int
    computed_tokens: int


@dataclass(frozen=True, slots=True)
class RepositoryAnswer:
    """An answer, and which files it had to compute.

    Attributes:
        completion: the answer.
        computed: files of which at least one token went through the model, in order.
    """

    completion: Completion
    computed: tuple[FileCost, ...]


class Repository:
    """A source tree to ask questions about. Made by `Engine.repository`.

    Attributes:
        path: its folder.
        namespace: where its prompts are cached.
        budget_tokens: tokens that all files together may have.
        packing: what of it is in the prompt; replaced by `refresh`, never changed.

    Thread safety: any thread may call anything; refreshes wait for each other, and nothing waits for a refresh.
    """

    def __init__(
        self,
        engine: Engine,
        path: str | Path,
        shelf: Shelf,
        *,
        budget_tokens: int | None,
        exclude: Sequence[str],
        namespace: str | Namespace,
    ) -> None:
        self._engine = engine
        self._exclude = tuple(exclude)
        self._lock = Lock()
        self._shelf = shelf
        self._bodies: dict[str, Tokens] = {}  # by content id; under the lock
        self.path = Path(path)
        self.namespace = namespace
        self._head = self._rendered("")[0]  # kept: a template may write the date into it
        self.budget_tokens = self._budget(budget_tokens)
        self._history = read_history(self.path)
        with self._lock:
            self.packing = self._pack(None)
        if not self.packing.files:
            example = f" ({self.skipped[0].path}: {self.skipped[0].reason})" if self.skipped else ""
            raise RepositoryError(str(path), f"it has no text file that fits in {self.budget_tokens:,} tokens{example}")

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Files that are not in the prompt, and why."""
        return self.packing.skipped

    def refresh(self) -> tuple[str, ...]:
        """Read the tree again; returns the paths that changed, came or went.

        Cost: reads every file, tokenises those that changed. Nothing is computed until the next question.

        Raises:
            RepositoryError: the folder is gone, cannot be read, or has no text left; the packing stays as it was.
        """
        with self._lock:
            before = self.packing
            packing = self._pack(before)
            self.packing = packing
        return packing.changed_since(before)

    def ask(self, question: str, params: SamplingParams | None = None) -> RepositoryAnswer:
        """Answer a question about the files as they were last read.

        Raises:
            PromptTooLong: files and question fill the context; give a smaller budget.
        """
        packing = self.packing
        prompt = self.prompt(question, packing)
        completion = self._engine.generate(prompt, params, namespace=self.namespace)[0]
        return RepositoryAnswer(completion, self.computed(completion.cached_tokens, packing))

    def stream(self, question: str, params: SamplingParams | None = None, packing: Packing | None = None) -> Iterator[Chunk]:
        """As `ask`, token by token; the last chunk carries the completion, and `computed` says what it cost."""
        return self._engine.stream(self.prompt(question, packing), params, namespace=self.namespace)

    def prompt(self, question: str, packing: Packing | None = None) -> Tokens:
        """The exact tokens that ask `question`.

        Cost: tokenises the question; one copy of the files' tokens.

        Args:
            question: any text.
            packing: the files to ask about; None takes those last read.
        """
        packing = packing if packing is not None else self.packing
        return Tokens(b"".join((self._head.data, packing.tokens.data, self._rendered(question)[1].data)))

    def computed(self, cached_tokens: int, packing: Packing | None = None) -> tuple[FileCost, ...]:
        """The files that a prompt with so many cached tokens has to compute, wholly or from some token on.

        Args:
            cached_tokens: of the answer, or of its first chunk.
            packing: what the prompt was made of; None takes what was last read.
        """
        start = max(cached_tokens - len(self._head), 0)
        return tuple(
            FileCost(file.path, len(file.tokens), file.stop - max(file.start, start))
            for file in (packing if packing is not None else self.packing).files
            if file.stop > start
        )

    def _budget(self, asked: int | None) -> int:
        engine = self._engine
        most = min(engine.max_context, engine.store.num_pages * engine.config.page_size) - len(self._head)
        budget = most - min(_RESERVED, most // 4) if asked is None else asked
        if not 0 < budget <= most:
            reason = (
                f"a budget of {budget:,} tokens is not between 1 and {most:,}, what the model's context and the pool hold"
            )
            raise RepositoryError(str(self.path), reason)
        return budget

    def _pack(self, last: Packing | None) -> Packing:
        listing = list_files(self.path, exclude=self._exclude)
        known = self._shelf.known(self.namespace)
        budget, history = self.budget_tokens, self._history
        packing = Packing.of(listing, budget, self._tokens, history=history, last=last, known=known)
        if last is not None and not packing.files:
            raise RepositoryError(str(self.path), "no text file is left in it")
        self._shelf.put(self.namespace, packing)
        live = {file.content_id for one in (*known, packing) for file in one.files}
        self._bodies = {content_id: body for content_id, body in self._bodies.items() if content_id in live}
        return packing

    def _tokens(self, file: SourceFile) -> Tokens:
        """A file's own tokens: an edit changes no other's. What looks like a special token in it is only text."""
        tokenizer = self._engine.tokenizer
        body = self._bodies.get(file.content_id)
        if body is None:
            body = Tokens(tokenizer.encode(f"{file.text}\n</file>\n", special=False, bos=False))
            self._bodies[file.content_id] = body
        return Tokens(tokenizer.encode(f'<file path="{file.path}">\n', special=False, bos=False)) + body

    def _rendered(self, question: str) -> tuple[Tokens, Tokens]:
        """The tokens before the files, and those after them."""
        tokenizer = self._engine.tokenizer
        if not tokenizer.has_chat_template:
            return Tokens(tokenizer.encode(_INTRODUCTION)), Tokens(
                tokenizer.encode(f"\nQuestion: {question}\nAnswer:", bos=False)
            )
        messages = [{"role": "system", "content": _INTRODUCTION + _MARK}, {"role": "user", "content": question}]
        try:
            text = tokenizer.chat_text(messages)
        except EngineError:  # some templates know no system message
            text = tokenizer.chat_text([{"role": "user", "content": f"{_INTRODUCTION}{_MARK}\n\n{question}"}])
        head, found, tail = text.partition(_MARK)
        if not found:
            raise RepositoryError(str(self.path), f"the chat template of {self._engine.name!r} does not show the files")
        return Tokens(tokenizer.encode(head, bos=False)), Tokens(tokenizer.encode(tail, bos=False))

    def __repr__(self) -> str:
        return f"Repository({str(self.path)!r}, files={len(self.packing.files)}, tokens={self.packing.num_tokens})"
