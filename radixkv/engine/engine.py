"""The engine: prompts in, answers out, prefixes computed once.

    generate / stream / chat ─▶ waiting ─▶ running ─▶ finished
                                   │          │
                            plan: who starts, who gets how many tokens, who makes room     (scheduler.py decides)
                                   │          │
                            lease, view, one forward pass for all, pages published         (executor.py acts)

Whoever waits for an answer drives the loop: `step()` advances every running request under one lock, so answers asked
for from several threads decode together; a server has one thread do nothing else (serving.py). A failing request never
takes another with it.
"""

from __future__ import annotations

import atexit
import gc
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from threading import Lock, RLock
from typing import Any

import numpy as np

from radixkv.cache import PrefixCache
from radixkv.engine.batcher import Batcher, EngineStats
from radixkv.engine.build import EngineParts, build, build_random
from radixkv.engine.config import EngineConfig
from radixkv.engine.executor import Executor
from radixkv.engine.options import RequestOptions
from radixkv.engine.output import Chunk, Completion
from radixkv.engine.paged import PagedRunner
from radixkv.engine.repository import Repository
from radixkv.engine.request import Request
from radixkv.engine.runner import ModelRunner
from radixkv.engine.sampling import SamplingParams
from radixkv.engine.session import Session
from radixkv.engine.structure import Matcher, StructureCompiler
from radixkv.engine.tokenizer import Tokenizer
from radixkv.errors import (
    ChatTemplateMissing,
    ConfigError,
    EmptyTokensError,
    EngineClosed,
    PromptTooLong,
    RequestTooLarge,
    TokenRangeError,
)
from radixkv.lease import Cursor
from radixkv.namespace import Namespace
from radixkv.repository import Shelf
from radixkv.store.device import DeviceStore
from radixkv.tokens import Tokens

__all__ = ["Engine"]

Prompt = Any
"""Text, token ids in any form `Tokens` takes, or chat messages: a list of {"role": ..., "content": ...}."""


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
    def random(cls, model_config: Any, *, seed: int = 0, tokenizer: Tokenizer | None = None, **settings: Any) -> Engine:
        """An engine of random weights in the shape of a transformers config, for tests and benches.

        Without a tokenizer it takes token ids only.
        """
        engine = cls.__new__(cls)
        engine._set_up(build_random(model_config, seed, EngineConfig(**settings), tokenizer))
        return engine

    def _set_up(self, parts: EngineParts) -> None:
        config = parts.config
        self.config = config
        self.name = parts.name
        self.max_context = parts.max_context
        self._executor = Executor(parts)
        self._tokenizer = parts.tokenizer
        self._shelf = Shelf()
        self._eos_ids = parts.eos_ids
        self._batcher = Batcher(self._executor, config)
        self._structures: StructureCompiler | None = None
        self._structures_lock = Lock()
        self._lock = RLock()
        self._closed = False

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

    def repository(
        self,
        path: str | Path,
        budget_tokens: int | None = None,
        exclude: Sequence[str] = (),
        namespace: str | Namespace = "",
    ) -> Repository:
        """Ask questions about a source tree; its files are computed once, and again only from the first changed one on.

        Args:
            path: its folder.
            budget_tokens: tokens that all files together may have; None takes what context and pool hold.
            exclude: more patterns to leave out, as a .gitignore writes them.
            namespace: as for `generate`.

        Raises:
            RepositoryError: no such folder, no text in it, or a budget that cannot be.
        """
        self._require_open()
        return Repository(self, path, self._shelf, budget_tokens=budget_tokens, exclude=exclude, namespace=namespace)

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
        """Advance: one token for every decoding request, and with them as much of waiting prompts as a step holds."""
        with self._lock:
            self._require_open()
            with self.store.here():
                self._batcher.step()

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return self._batcher.busy

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return self._batcher.num_waiting

    def waiting_by_tenant(self) -> Counter[str]:
        """How many requests of each tenant are in the queue. Cost: O(waiting)."""
        with self._lock:
            return self._batcher.waiting_by_tenant()

    def _submit(self, requests: Sequence[Request]) -> None:
        with self._lock:
            self._require_open()
            self._batcher.submit(requests)

    def _cancel(self, requests: Sequence[Request]) -> None:
        """End what is not finished: its reader went away.

        A reader may be collected in the middle of a step, by this very thread; then the step's end does it.
        """
        self._batcher.doom(requests)
        with self._lock:
            if not self._closed:
                with self.store.here():
                    self._batcher.reap()

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
        params.require_vocabulary(self.runner.vocab_size)
        request = Request(
            tokens,
            params,
            options,
            namespace_key=self.cache.namespace_key(options.namespace),
            cursor=cursor,
            use_cache=self._use_cache(options.cache),
            in_pages=self._executor.residence.in_pages,
            tokenizer=self._tokenizer,
            max_context=self.max_context,
            eos_ids=self._eos_ids,
            matcher=self._matcher(params),
        )
        num_pages = -(-request.capacity // self.config.page_size)
        if request.job.paged and num_pages > self.store.num_pages:
            raise RequestTooLarge(num_pages, self.store.num_pages)
        return request

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        """What holds an answer to its form, if it must have one; raises before the request is in the queue."""
        if params.structure is None:
            return None
        tokenizer = self.tokenizer
        with self._structures_lock:
            if self._structures is None:
                self._structures = StructureCompiler(tokenizer, self._eos_ids)
        return self._structures.matcher(params.structure)

    def _tokens(self, prompt: Prompt) -> Tokens:
        if isinstance(prompt, str):
            return Tokens(self.tokenizer.encode(prompt))
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            return Tokens(self.tokenizer.chat_ids(prompt, add_generation_prompt=True))
        return Tokens(prompt)

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
    def cache(self) -> PrefixCache:
        """Which prefix stands in which pages."""
        return self._executor.cache

    @property
    def store(self) -> DeviceStore:
        """Where the pages' bytes are."""
        return self._executor.store

    @property
    def runner(self) -> ModelRunner | PagedRunner:
        """The model."""
        return self._executor.residence.runner

    @runner.setter
    def runner(self, runner: ModelRunner | PagedRunner) -> None:
        self._executor.residence.runner = runner

    def warm_up(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """On a GPU, compile the layers and capture the graphs of small steps; requests may run meanwhile, more slowly.

        Then all objects that live by now are taken out of the sight of Python's garbage collector (`gc.freeze`), which else
        stops everything for half a second now and then to look through libraries that never go away.

        Cost: seconds to minutes; nothing on a CPU.

        Args:
            progress: called with ("compile" or "graphs", done, in all).
        """
        self._require_open()
        if not isinstance(self.runner, PagedRunner):
            return
        with self.store.here():
            self.runner.warm_up(progress)
        with self._lock:
            if not self._closed:
                gc.collect()
                gc.freeze()
                atexit.register(gc.unfreeze)  # or what was frozen would be reported as leaked

    # -- look at ------------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Totals since the start."""
        with self._lock:
            return self._batcher.stats()

    def close(self) -> None:
        """Cancel what runs and give back the memory. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            with self.store.here():
                self._batcher.cancel_all()
                self._closed = True
                self._executor.close()
            gc.unfreeze()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Engine({self.name!r}, running={self._batcher.num_running}, waiting={self._batcher.num_waiting})"


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
