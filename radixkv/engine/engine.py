"""The embedded engine: prompts in, answers out, prefixes computed once.

    generate / stream / chat ─▶ waiting ─▶ one prefilling ─▶ up to max_running decoding ─▶ finished
                                   │            │                     │
                                lease       chunk by chunk,      one step for all of them
                              + view        pages published      pages published as they fill

Whoever waits for an answer drives the loop: `step()` advances every running request under one lock, so answers asked
for from several threads decode together. A failing request never takes another with it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import RLock
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from radixkv.cache import CacheStats, PrefixCache
from radixkv.engine.build import EngineParts, build, build_random
from radixkv.engine.config import EngineConfig
from radixkv.engine.options import RequestOptions
from radixkv.engine.output import Chunk, Completion, FinishReason
from radixkv.engine.request import Request
from radixkv.engine.runner import Work
from radixkv.engine.sampling import SamplingParams
from radixkv.engine.session import Session
from radixkv.engine.tokenizer import Tokenizer
from radixkv.engine.view import NO_ORIGIN, ViewPool
from radixkv.errors import (
    ChatTemplateMissing,
    ConfigError,
    EmptyTokensError,
    EngineClosed,
    PoolExhausted,
    PromptTooLong,
    QuotaExceeded,
    RequestInterrupted,
    RequestTooLarge,
    TokenRangeError,
)
from radixkv.lease import Cursor, Lease
from radixkv.namespace import Namespace
from radixkv.tokens import Tokens

__all__ = ["WILL_CONTINUE", "Engine", "EngineStats"]

log = logging.getLogger("radixkv.engine")

WILL_CONTINUE = 1
"""Tag of a request of a session: another turn is likely. The policy `auto` learns what that is worth."""

_IDLE_CONTEXTS, _IDLE_SHARE = 2, 0.25  # idle working views hold at most so many contexts, and this share of the pool

Prompt = Any
"""Text, token ids in any form `Tokens` takes, or chat messages: a list of {"role": ..., "content": ...}."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine did: cached_tokens + computed_tokens = prompt_tokens of all finished and failed requests."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    generated_tokens: int
    prefill_s: float
    cache: CacheStats

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed a second; 0 before the first."""
        return self.computed_tokens / self.prefill_s if self.prefill_s else 0.0


class Engine:
    """A model with a radix-cached prefix, in this process.

    Args:
        model: a name ("smollm2"), a folder, a .gguf file, or a hub id.
        config: settings; or give them by name: `Engine("smollm2", page_size=32, exact=True)`.
        settings: fields of `EngineConfig`.

    Raises:
        ModelError: no such model, damaged weights, or an unsupported architecture.
        ConfigError: a setting that cannot be.

    Thread safety: any thread may call anything; requests of several threads decode together.
    """

    def __init__(self, model: str, config: EngineConfig | None = None, **settings: Any) -> None:
        if config is not None and settings:
            raise ConfigError("config", config, "either a config or single settings, not both")
        self._set_up(build(str(model), config if config is not None else EngineConfig(**settings)))

    @classmethod
    def random(cls, model_config: Any, *, seed: int = 0, **settings: Any) -> Engine:
        """An engine of random weights in the shape of a transformers config: token ids only, for tests and benches."""
        engine = cls.__new__(cls)
        engine._set_up(build_random(model_config, seed, EngineConfig(**settings)))
        return engine

    def _set_up(self, parts: EngineParts) -> None:
        self.config = parts.config
        self.name = parts.name
        self.max_context = parts.max_context
        self.runner = parts.runner
        self.store = parts.store
        self.cache: PrefixCache = parts.cache
        self._tokenizer = parts.tokenizer
        self._eos_ids = parts.eos_ids
        pool_tokens = parts.store.num_pages * parts.config.page_size
        self._views = ViewPool(parts.store, min(_IDLE_CONTEXTS * parts.max_context, int(pool_tokens * _IDLE_SHARE)))
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._doomed: deque[Request] = deque()  # readers went away; taken off when no step is under way
        self._stepping = False
        self._blocked_since = -1  # requests ended when the first in the queue was last found not to fit
        self._lock = RLock()
        self._closed = False
        self._requests = self._prompt_tokens = self._cached = self._computed = self._generated = 0
        self._prefill_s = 0.0

    # -- ask ----------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        namespace: str | Namespace = "",
        cache: bool | None = None,
    ) -> list[Completion]:
        """Answer one prompt or several; several decode together, and share what their beginnings have in common.

        Args:
            prompts: one prompt or a list of prompts; each is text, token ids, or chat messages.
            params: how to choose tokens; greedy by default.
            namespace: a tenant's salt; prefixes are shared inside a namespace only.
            cache: False neither looks up nor keeps anything; None is the engine's setting.

        Returns:
            One Completion a prompt, in order.

        Raises:
            TokenError, PromptTooLong, RequestTooLarge: a prompt that cannot be run; none of them is run then.
            RadixKVError: the first request to fail while running; answers of the others are dropped, what they computed
                stays cached.
        """
        several = _as_prompts(prompts)
        options = RequestOptions(namespace=namespace, cache=cache)
        requests = [self._request(prompt, params, options) for prompt in several]
        self._submit(requests)
        try:
            while not all(request.finished for request in requests):
                self.step()
        finally:
            self._cancel(requests)
        return [_result(request) for request in requests]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        namespace: str | Namespace = "",
        cache: bool | None = None,
    ) -> Iterator[Chunk]:
        """Answer one prompt token by token; the last chunk carries the Completion. Closing it cancels the request.

        Raises:
            As `generate`; when called, not when first read.
        """
        return self._read(self._request(prompt, params, RequestOptions(namespace=namespace, cache=cache)))

    def chat(self, system: str | None = None, *, namespace: str | Namespace = "", cache: bool | None = None) -> Session:
        """Open a conversation. Its history is kept as exact token ids and never tokenised again.

        Args:
            system: a system message.
            namespace: as for `generate`.
            cache: as for `generate`.

        Raises:
            ChatTemplateMissing: the model cannot chat.
        """
        self._require_open()
        if not self.tokenizer.has_chat_template:
            raise ChatTemplateMissing(self.name)
        return Session(self, system, namespace=namespace, cache=self._use_cache(cache))

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ConfigError: the engine has random weights, and so no tokenizer.
        """
        if self._tokenizer is None:
            raise ConfigError("prompt", "text", "token ids: this engine has no tokenizer")
        return self._tokenizer

    # -- run ----------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Advance: one chunk of the prompt being prefilled, or else one token for every decoding request."""
        with self._lock:
            self._require_open()
            self._stepping = True
            try:
                self._advance()
            finally:
                self._stepping = False
                self._reap()

    def _advance(self) -> None:
        prefilling = next((request for request in self._running if not request.prefilled), None) or self._admit()
        if prefilling is not None:
            self._guarded([prefilling], self._prefill)
            return
        for batch in [[one] for one in self._running] if self.config.exact else [list(self._running)]:
            self._guarded(batch, self._decode)

    def _admit(self) -> Request | None:
        """Start the request that waits longest, if pages enough are free or evictable for it and those that run."""
        if not self._waiting or len(self._running) >= self.config.max_running or self._blocked_since == self._requests:
            return None
        request = self._waiting[0]
        self._guarded([request], self._lease)
        if self._running and request.lease is not None and not self._fits(request):
            request.lease.release()
            request.lease = None
            self._blocked_since = self._requests
            return None
        self._waiting.popleft()
        if not request.finished:
            self._running.append(request)
            self._guarded([request], self._start)
        return None if request.finished else request

    def _lease(self, batch: Sequence[Request]) -> None:
        """Look a request's prompt up, and lock what is found."""
        (request,) = batch
        if request.use_cache:
            prompt = request.cursor if request.cursor is not None else request.prompt
            limit = len(request.prompt) - 1  # the last token's logits are needed
            tag = WILL_CONTINUE if request.cursor is not None else 0
            request.lease = self.cache.acquire(prompt, request.namespace, limit=limit, owner="engine", tag=tag)

    def _fits(self, request: Request) -> bool:
        """Whether what this request and the running ones may still ask for is free or evictable."""
        stats = self.cache.stats()
        promised = sum(self._missing_pages(other) for other in (*self._running, request))
        return promised <= stats.num_free + stats.num_evictable

    def _missing_pages(self, request: Request) -> int:
        """Pages a running request may still ask for."""
        if request.lease is None:
            return 0
        have = request.lease.num_published // self.config.page_size + request.lease.num_own_pages
        return max(-(-request.capacity // self.config.page_size) - have, 0)

    def _start(self, batch: Sequence[Request]) -> None:
        """Give a request its view, loaded with what the cache has."""
        (request,) = batch
        if request.lease is None:
            request.view, _ = self._views.take(request.capacity)
            return
        matched, block = request.lease.num_matched, self.config.exact_block
        start = matched // block * block if self.config.exact else matched
        origin = self._origin(request.lease, start // self.config.page_size)
        request.view, held = self._views.take(request.capacity, origin)
        pages, cut = request.lease.pages, request.lease.partial_page
        source = pages if cut is None else [*pages, cut]
        request.view.load(self.store, source, held * self.config.page_size, start)
        request.cached = request.position = start  # only now: a view that failed to load must not pass for loaded
        request.lease.extend()

    def _origin(self, lease: Lease, num_pages: int) -> npt.NDArray[np.int64]:
        """[n, 2] page ids and generations of a lease's first `num_pages` pages."""
        pages = np.array(lease.pages[:num_pages], np.int64)
        return np.stack([pages, self.cache.generations(pages)], axis=1)

    def _prefill(self, batch: Sequence[Request]) -> None:
        """Compute the next chunk of a prompt; the first token follows the last chunk."""
        (request,) = batch
        assert request.view is not None
        size = self.config.exact_block if self.config.exact else self.config.prefill_chunk
        start, left = request.position, len(request.prompt) - request.position
        spare = 0 if self.config.exact else size // 2  # a short last chunk would read all weights for a few tokens
        end = start + (left if left <= size + spare else size)
        last = end == len(request.prompt)
        tokens = request.prompt.array[start:end]
        started = perf_counter()
        logits = self.runner.forward([Work(request.view, tokens, start, last and request.max_output > 0)])
        self._prefill_s += perf_counter() - started
        request.position = end
        request.computed += end - start
        self._publish(request, end if not self.config.exact else end // size * size)
        if last and request.max_output > 0:
            self._settle(request, request.accept(logits[0]))
        elif last:
            self._settle(request, "length")

    def _decode(self, batch: Sequence[Request]) -> None:
        """Feed every request its newest token, and choose the one after it."""
        ready = [request for request in batch if self._reserve(request)]
        works = [Work(request.view, request.newest, request.position, True) for request in ready if request.view]
        if not works:
            return
        logits = self.runner.forward(works)
        for request, row in zip(ready, logits, strict=True):
            self._guarded([request], partial(self._take, row))

    def _take(self, logits: torch.Tensor, batch: Sequence[Request]) -> None:
        """One request's part of a decode step, once its logits are there."""
        (request,) = batch
        request.position += 1
        if not self.config.exact and request.position % self.config.page_size == 0:
            self._publish(request, request.position)
        self._settle(request, request.accept(logits))

    def _reserve(self, request: Request) -> bool:
        """Give the newest token a slot. Where the pool has none left, this request ends, and only this one."""
        if request.lease is not None and request.lease.num_tokens == request.position:
            try:
                request.lease.extend(request.newest)
            except (PoolExhausted, QuotaExceeded) as error:
                log.warning("request dropped: %s", error)
                self._fail([request], error)
                return False
        return True

    def _publish(self, request: Request, num_tokens: int) -> None:
        """Save whole pages of the view's first `num_tokens` tokens, then let everybody find them."""
        lease = request.lease
        if lease is None:
            return
        assert request.view is not None
        size = self.config.page_size
        first, last = lease.num_published // size, num_tokens // size
        if last > first:
            request.view.save(self.store, lease.pages[first:last], first)
            lease.commit(last * size)

    # -- end ----------------------------------------------------------------------------------------------------------

    def _settle(self, request: Request, reason: FinishReason | None) -> None:
        if reason is not None:
            self._end(request)
            request.finish(reason)

    def _end(self, request: Request) -> None:
        """Take a request off the engine; its published pages stay cached."""
        if request in self._running:
            self._running.remove(request)
        if request.view is not None:
            lease = request.lease
            written = 0 if lease is None else min(lease.num_published, request.position) // self.config.page_size
            self._views.give(request.view, NO_ORIGIN if lease is None else self._origin(lease, written))
            request.view = None
        if request.lease is not None:
            request.lease.release()
            request.lease = None
        self._requests += 1
        self._prompt_tokens += len(request.prompt) if request.prefilled else request.cached + request.computed
        self._cached += request.cached
        self._computed += request.computed
        self._generated += len(request.output)

    def _guarded(self, batch: Sequence[Request], act: Callable[[Sequence[Request]], None]) -> None:
        """Run one action; if it fails, the requests in it fail and all others go on.

        An interrupt goes on to whoever drives the engine; the requests it caught in the middle of a step end with it.
        """
        try:
            act(batch)
        except Exception as error:
            log.warning("%d requests end: %s", len(batch), error)
            self._fail(batch, error)
        except BaseException:
            self._fail(batch, RequestInterrupted())
            raise

    def _fail(self, batch: Sequence[Request], error: Exception) -> None:
        for request in batch:
            if not request.finished:
                self._end(request)
                request.error = error

    def _cancel(self, requests: Sequence[Request]) -> None:
        """End what is not finished: its reader went away.

        A reader may be collected in the middle of a step, by this very thread; then the step's end does it.
        """
        self._doomed.extend(requests)
        with self._lock:
            if not self._stepping:
                self._reap()

    def _reap(self) -> None:
        while self._doomed:
            request = self._doomed.popleft()
            if not request.finished:
                if request in self._waiting:
                    self._waiting.remove(request)
                self._end(request)
                request.finish("cancelled")

    # -- parts --------------------------------------------------------------------------------------------------------

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        options: RequestOptions | None,
        cursor: Cursor | None = None,
    ) -> Request:
        """Check a prompt and make its request."""
        self._require_open()
        options = options if options is not None else RequestOptions()
        params = params if params is not None else SamplingParams()
        tokens = self._tokens(prompt)
        if not len(tokens):
            raise EmptyTokensError
        highest = int(tokens.array.max())
        if highest >= self.runner.vocab_size:
            raise TokenRangeError(highest, int(tokens.array.argmax()), self.runner.vocab_size)
        if len(tokens) + min(params.max_tokens, 1) > self.max_context:
            raise PromptTooLong(len(tokens), self.max_context)
        if params.stop and self._tokenizer is None:
            raise ConfigError("stop", params.stop, "stop_token_ids: this engine has no tokenizer")
        self.cache.namespace_key(options.namespace)
        request = Request(
            tokens,
            params,
            namespace=options.namespace,
            cursor=cursor,
            use_cache=self._use_cache(options.cache),
            tokenizer=self._tokenizer,
            max_context=self.max_context,
            eos_ids=self._eos_ids,
        )
        num_pages = -(-request.capacity // self.config.page_size)
        if request.use_cache and num_pages > self.store.num_pages:
            raise RequestTooLarge(num_pages, self.store.num_pages)
        return request

    def _tokens(self, prompt: Prompt) -> Tokens:
        if isinstance(prompt, str):
            return Tokens(self.tokenizer.encode(prompt))
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            return Tokens(self.tokenizer.chat_ids(prompt, add_generation_prompt=True))
        return Tokens(prompt)

    def _submit(self, requests: Sequence[Request]) -> None:
        with self._lock:
            self._require_open()
            self._waiting.extend(requests)

    def _read(self, request: Request) -> Generator[Chunk]:
        """Submit a request when its first chunk is asked for, and hand out its chunks; a stream never read costs nothing."""
        self._submit([request])
        try:
            finished = False
            while not finished:
                finished = request.finished  # before the chunks are taken, or another thread's last ones would be lost
                while request.chunks:
                    yield request.chunks.pop(0)
                if not finished:
                    self.step()
            _result(request)
        finally:
            self._cancel([request])

    def _use_cache(self, cache: bool | None) -> bool:
        return self.config.cache if cache is None else cache

    def _require_open(self) -> None:
        if self._closed:
            raise EngineClosed

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running)

    # -- look at ------------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Totals since the start."""
        with self._lock:
            return EngineStats(
                requests=self._requests,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached,
                computed_tokens=self._computed,
                generated_tokens=self._generated,
                prefill_s=self._prefill_s,
                cache=self.cache.stats(),
            )

    def close(self) -> None:
        """Cancel what runs and give back the memory. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._cancel([*self._running, *self._waiting])
            self._closed = True
            self.cache.flush()
            del self.store, self._views, self.runner

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Engine({self.name!r}, running={len(self._running)}, waiting={len(self._waiting)})"


def _as_prompts(prompts: Prompt) -> list[Prompt]:
    """Tell one prompt from a list of prompts."""
    if isinstance(prompts, (list, tuple)) and prompts and not isinstance(prompts[0], (int, np.integer, dict)):
        return list(prompts)
    return [prompts]


def _result(request: Request) -> Completion:
    if request.error is not None:
        raise request.error
    assert request.completion is not None
    return request.completion
