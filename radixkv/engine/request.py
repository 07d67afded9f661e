"""One request on its way through the engine.

waiting ── lease, view ──▶ prefilling ── last prompt token ──▶ decoding ── stop, length, cancel ──▶ finished
   ▲                            │                                 │
   └───────── preempted: lease and view go, what was published stays cached ◀┘

sequence    prompt ..................... answer ........ last token
lease       [0, prompt + answer - 1)     (the last token has no KV yet: nobody needs it until it is continued)
view        [0, position)                KV that is written
"""

from __future__ import annotations

from itertools import count
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from radixkv.engine.options import RequestOptions
from radixkv.engine.output import Chunk, Completion, FinishReason
from radixkv.engine.sampler import Sampler, TokenLogprob
from radixkv.engine.sampling import SamplingParams
from radixkv.engine.scheduler import Job
from radixkv.engine.structure import Matcher
from radixkv.engine.tokenizer import TextStream, Tokenizer
from radixkv.engine.view import WorkingView
from radixkv.lease import Cursor, Lease
from radixkv.tokens import Tokens

__all__ = ["Request"]

_ids = count(1)


class Request:
    """The state of one request. Owned by the engine, changed under its lock.

    Attributes:
        prompt, num_prompt: its tokens, and how many.
        options: what it asks of cache and scheduler.
        cursor: a conversation's place in the cache, if it has one.
        job: what the scheduler sees of it.
        lease: its claim on pages; None before it starts, and when it does not use the cache.
        view: its working view, while it runs and has one.
        page_table: its page ids while it runs in pages, and the state of the lease that they are from.
        begun: whether it runs: it has a place for its KV.
        position: tokens whose KV is written, or is being written by a step that is under way.
        pending: tokens that steps under way choose for it.
        cached, computed: prompt tokens that came from the cache, and that went through the model: each is counted once.
        written: prompt tokens that it published.
        recomputed: tokens that went through the model again after a preemption.
        output: generated token ids.
        chunks: what a reader has not taken yet.
        error: what ended it, if it failed.
    """

    def __init__(
        self,
        prompt: Tokens,
        params: SamplingParams,
        options: RequestOptions,
        *,
        namespace_key: bytes,
        cursor: Cursor | None,
        use_cache: bool,
        in_pages: bool,
        tokenizer: Tokenizer | None,
        max_context: int,
        eos_ids: frozenset[int],
        matcher: Matcher | None = None,
    ) -> None:
        self.prompt = prompt
        self.num_prompt = len(prompt)
        self.params = params
        self.options = options
        self.cursor = cursor
        self.use_cache = use_cache
        self.max_output = min(params.max_tokens, max_context - len(prompt))
        self.stop_ids = params.stop_token_ids | (frozenset() if params.ignore_eos else eos_ids)
        self.lease: Lease | None = None
        self.view: WorkingView | None = None
        self.page_table: tuple[tuple[int, int], npt.NDArray[np.int32]] | None = None
        self.begun = False
        self.pending = 0
        self.position = self.cached = self.computed = self.written = self.recomputed = 0
        self.output: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.chunks: list[Chunk] = []
        self.completion: Completion | None = None
        self.error: BaseException | None = None
        self._reached = 0  # the furthest position ever: what lies before it was counted
        self._matcher = matcher
        self._sampler: Sampler | None = None
        self._stream = TextStream(tokenizer, params.stop) if tokenizer is not None else None
        self._text: list[str] = []
        self._tail = ""  # the text that was still held back at the end
        self._stopped_by: str | int | None = None
        self._started = perf_counter()
        self._first: float | None = None
        self.job = Job(
            id=next(_ids),
            prompt=prompt.array.tobytes(),
            namespace=namespace_key,
            num_tokens=len(prompt),
            max_output=self.max_output,
            tenant=options.tenant,
            priority=options.priority,
            affinity=options.affinity,
            arrived_s=self._started,
            paged=use_cache or in_pages,
        )
        if options.deadline_s is not None:
            self.job.deadline_at_s = self._started + options.deadline_s

    @property
    def capacity(self) -> int:
        """Tokens whose KV may be written before it ends: all but the last one generated."""
        return len(self.prompt) + max(self.max_output - 1, 0)

    @property
    def num_known(self) -> int:
        """Tokens of the sequence whose ids are known: prompt and generated."""
        return self.num_prompt + len(self.output)

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, those that a step under way chooses counted in."""
        return self.num_prompt + len(self.output) + self.pending

    @property
    def complete_after_pending(self) -> bool:
        """Whether nothing is left to compute once the steps under way are done."""
        return len(self.output) + self.pending >= self.max_output and self.position >= self.num_prompt

    @property
    def finished(self) -> bool:
        """Whether it has ended, well or not."""
        return self.completion is not None or self.error is not None

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """[stop - start] tokens of the sequence. Cost: O(them)."""
        split = self.num_prompt
        if stop <= split:
            return self.prompt.array[start:stop]
        generated = np.array(self.output[max(start - split, 0) : stop - split], np.int32)
        return generated if start >= split else np.concatenate([self.prompt.array[start:], generated])

    def move(self, position: int, *, computed: bool) -> None:
        """The view now reaches to `position`: count the prompt tokens that are new, and those computed again."""
        fresh = max(min(position, self.num_prompt) - self._reached, 0)
        if computed:
            self.computed += fresh
            self.recomputed += max(min(position, self._reached) - self.position, 0)
        else:
            self.cached += fresh
        self.position = position
        self._reached = max(self._reached, position)

    def sampler(self, logits: torch.Tensor) -> Sampler:
        """What chooses its tokens from logits like these [.., V]."""
        if self._sampler is None:
            self._sampler = Sampler(
                self.params, logits.shape[-1], logits.device, end_ids=self.stop_ids, matcher=self._matcher
            )
            self._sampler.note(torch.from_numpy(self.prompt.array.astype(np.int64)))
        return self._sampler

    @property
    def structured(self) -> bool:
        """Whether its next token cannot be chosen before the last one is known."""
        return self._matcher is not None

    def accept(self, token_id: int, logprob: TokenLogprob | None) -> FinishReason | None:
        """Take the next token; returns why the answer ends with it, or None."""
        if self._first is None:
            self._first = perf_counter()
        self.output.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        ended = token_id in self.stop_ids
        text = "" if ended or self._stream is None else self._stream.push(token_id)
        self._text.append(text)
        self.chunks.append(Chunk(text, token_id, cached_tokens=self.cached, logprob=logprob))
        if self._stream is not None and self._stream.stopped:
            self._stopped_by = self._stream.stopped
        elif token_id in self.params.stop_token_ids:
            self._stopped_by = token_id
        if ended or self._stopped_by is not None:
            return "stop"
        if len(self.output) < self.max_output:
            return None
        assert self._sampler is not None
        whole = self.params.structure is not None and self._sampler.accepting  # only the end token found no room
        return "stop" if whole else "length"

    def complete(self, reason: FinishReason) -> Completion:
        """Make the completion; nobody sees it before `finish`."""
        self._tail = self._stream.flush() if self._stream is not None else ""
        self._text.append(self._tail)
        now = perf_counter()
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self.output),
            finish_reason=reason,
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            computed_tokens=self.computed,
            ttft_s=(self._first or now) - self._started,
            total_s=now - self._started,
            logprobs=tuple(self.logprobs) if self.params.logprobs is not None else None,
            written_tokens=self.written,
            stopped_by=self._stopped_by,
        )

    def finish(self, completion: Completion) -> None:
        """It has ended well, and holds nothing any more."""
        self.chunks.append(Chunk(self._tail, None, completion, cached_tokens=self.cached))
        self.completion = completion  # last: a reader that sees it finds every chunk
