"""The server's state: settings, keys, the engine behind its thread, and what is being answered.

loading ──▶ ok ──▶ draining ──▶ closed
   └──▶ failed ◀──┘ (the model cannot be loaded; the engine's thread ended)

On a GPU the loader goes on once the model is there: it compiles layers and captures graphs while requests are answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from threading import Thread
from time import perf_counter, time
from typing import TYPE_CHECKING, Literal, Protocol

from radixkv.errors import ChatTemplateMissing
from radixkv_service.auth import Keyring, read_keys, tenant_of
from radixkv_service.errors import Problem
from radixkv_service.metrics import Metrics
from radixkv_service.repository_store import RepositoryStore
from radixkv_service.settings import ServiceSettings
from radixkv_service.token_text import TokenTexts

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine
    from radixkv.engine.serving import AsyncEngine
    from radixkv.engine.session_store import SessionStore
    from radixkv.engine.transcripts import Transcripts

__all__ = ["Cancellable", "Service", "Status"]

log = logging.getLogger("radixkv.service")

Status = Literal["loading", "ok", "draining", "failed"]

_STAGES = {"compile": "compiling layers", "graphs": "capturing CUDA graphs"}


class Cancellable(Protocol):
    """What runs, and can be told to end."""

    def cancel(self) -> None:
        """End it."""


class Service:
    """What the routes share. Belongs to one event loop.

    Args:
        settings: checked ones.
        on_failure: called when the server can no longer answer: the process should end.

    Attributes:
        status: where it is in its life.
        keys: who may ask.
        metrics: what is counted.
        running: what is being answered now.
        receiving: how long the bodies that are coming now are waited for; a drain ends that.
        settled: set once the model is loaded, or cannot be.
        created: when it started, in seconds since 1970.
        repositories: source trees that clients ask about.

    Raises:
        ConfigError: keys that cannot be used.
    """

    def __init__(self, settings: ServiceSettings, on_failure: Callable[[], None] = lambda: None) -> None:
        entries = [key.get_secret_value() for key in settings.api_keys]
        if settings.api_keys_file is not None:
            entries += read_keys(settings.api_keys_file)
        token = settings.admin_token
        self.settings = settings
        self.keys = Keyring(entries, token.get_secret_value() if token is not None else None)
        self.metrics = Metrics(settings.names[0])
        self.status: Status = "loading"
        self.running: set[Cancellable] = set()
        self.receiving: set[asyncio.Timeout] = set()
        self.created = int(time())
        self.settled = asyncio.Event()
        self._front: AsyncEngine | None = None
        self._transcripts: Transcripts | None = None
        self._sessions: SessionStore | None = None
        self.repositories = RepositoryStore(
            settings.repository_root,
            max_open=settings.max_repositories,
            max_per_tenant=self._share(settings.max_repositories),
        )
        self._texts: TokenTexts | None = None
        self._on_failure = on_failure
        self._loader: Thread | None = None
        self._watcher: asyncio.Task[None] | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the model in the background, then warm it up; `status` says whether it is loaded."""
        loop = asyncio.get_running_loop()

        def load() -> None:
            try:
                from radixkv.engine.engine import Engine
                from radixkv.engine.transcripts import Transcripts

                engine = Engine(self.settings.model, self.settings.engine_config())
                # NOTE: renders the chat template, which takes a second the first time, before a request waits for it.
                transcripts = Transcripts(engine.tokenizer) if engine.tokenizer.has_chat_template else None
            except Exception as error:
                log.exception("the model cannot be loaded") if log.isEnabledFor(logging.DEBUG) else log.error("%s", error)
                _call(loop, self._fail)
            else:
                _call(loop, self._loaded, engine, transcripts)
                self._warm_up(engine)

        # NOTE: a daemon, since neither can be interrupted, and a server that is told to end should not wait for it.
        self._loader = Thread(target=load, name="radixkv-loader", daemon=True)
        self._loader.start()

    def _warm_up(self, engine: Engine) -> None:
        """On the loader's thread: make steps faster, which takes long. No request waits for it, or needs it."""
        try:
            engine.warm_up(_Stages())
        except Exception as error:
            if self.status in ("draining", "failed"):
                log.debug("the server ended while it warmed up: %s", error)
            else:
                log.warning("warming up failed, so requests are answered more slowly than they might be: %s", error)

    def _loaded(self, engine: Engine, transcripts: Transcripts | None) -> None:
        from radixkv.engine.serving import AsyncEngine

        if self.status != "loading":
            engine.close()
            return
        self._front = AsyncEngine(engine)
        self._transcripts = transcripts
        try:
            self._sessions = self._session_store(transcripts) if transcripts is not None else None
        except Exception:
            log.exception("the server cannot start")
            self._fail()
            return
        self.status = "ok"
        self.settled.set()
        self._watcher = asyncio.create_task(self._watch(self._front))
        log.info("ready: %s, %d pages of %d tokens", engine.name, engine.store.num_pages, engine.config.page_size)

    def _session_store(self, transcripts: Transcripts) -> SessionStore:
        from radixkv.engine.session_store import SessionStore

        # The session routes name a tenant's namespaces by texts; its salts count as one.
        return SessionStore(
            transcripts,
            max_sessions=self.settings.max_sessions,
            max_per_tenant=self._share(self.settings.max_sessions),
            tenant_of=lambda namespace: tenant_of(namespace) if isinstance(namespace, str) else namespace,
            max_chars=self.max_tokens * _longest_token(self.engine),
        )

    def _share(self, limit: int) -> int:
        """A tenant's part of what all may have: a quarter, unless there is one tenant only."""
        return limit if len(self.keys.tenants) < 2 else max(limit // 4, 1)

    async def _watch(self, front: AsyncEngine) -> None:
        """Notice when the engine's thread ends, which it should not."""
        await front.ended()
        if self.status in ("ok", "draining"):
            log.error("the engine's thread ended; the server ends with it")
            self._fail()

    def _fail(self) -> None:
        self.status = "failed"
        self.settled.set()
        self._on_failure()

    @property
    def still_loading(self) -> bool:
        """Whether the loader still loads or warms up, and so would hold up a normal end of the process."""
        return self._loader is not None and self._loader.is_alive()

    def drain(self) -> None:
        """Take no more requests; those that run go on, and those whose body is still coming are refused."""
        if self.status != "failed":
            self.status = "draining"
        for patience in self.receiving:
            if not patience.expired():
                patience.reschedule(asyncio.get_running_loop().time())

    def cancel_all(self) -> None:
        """End everything that is being answered."""
        for run in list(self.running):
            run.cancel()

    async def close(self) -> None:
        """End the engine and give back its memory."""
        if self._watcher is not None:
            self._watcher.cancel()
        self.drain()
        self.cancel_all()
        if self._front is not None:
            await self._front.close()

    # -- for the routes -----------------------------------------------------------------------------------------------

    def unavailable(self) -> Problem | None:
        """Why nothing can be answered now, if so."""
        if self.status == "ok" and self._front is not None and self._front.alive:
            return None
        what = {
            "loading": ("the model is still being loaded", 2),
            "draining": ("the server is shutting down", 5),
        }.get(self.status, ("the engine is not running", 30))
        headers = {"retry-after": str(what[1])}
        return Problem(503, "service_unavailable_error", f"{what[0]}; try again", None, self.status, headers)

    @property
    def front(self) -> AsyncEngine:
        """The engine's front; the gate lets requests through only once it is there."""
        assert self._front is not None
        return self._front

    @property
    def engine(self) -> Engine:
        """The engine; only what is safe from any thread may be used of it."""
        return self.front.engine

    @property
    def transcripts(self) -> Transcripts:
        """The exact ids of the answers given lately.

        Raises:
            ChatTemplateMissing: the model cannot chat.
        """
        if self._transcripts is None:
            raise ChatTemplateMissing(self.engine.name)
        return self._transcripts

    @property
    def sessions(self) -> SessionStore:
        """Conversations kept for clients that send their turns only.

        Raises:
            ChatTemplateMissing: the model cannot chat.
        """
        if self._sessions is None:
            raise ChatTemplateMissing(self.engine.name)
        return self._sessions

    @property
    def token_texts(self) -> TokenTexts:
        """What each token id says."""
        if self._texts is None:
            self._texts = TokenTexts(self.engine.tokenizer)
        return self._texts

    @property
    def fingerprint(self) -> str:
        """Of weights, tokenizer, dtype and layout, short."""
        return f"fp_{self.engine.cache.fingerprint[:12]}"

    @property
    def max_tokens(self) -> int:
        """The longest prompt plus answer, in tokens: what the context and the pool hold."""
        engine = self.engine
        return min(engine.max_context, engine.store.num_pages * engine.config.page_size)

    async def scrape(self) -> bytes:
        """The metrics now; the engine's part as it was last, where it is busy for long."""
        if self._front is not None and self._front.alive:
            collector = self.metrics.engine
            collector.stats = await asyncio.to_thread(self._front.engine.stats)
        return self.metrics.render()


class _Stages:
    """Logs how warming up gets on: a line when a stage begins, and one when it is done."""

    def __init__(self) -> None:
        self._begun_s: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._begun_s:
            self._begun_s[stage] = perf_counter()
            log.info("warming up: %s; requests are answered meanwhile", _STAGES.get(stage, stage))
        if done == total:
            log.info("warming up: %s took %.1f s", _STAGES.get(stage, stage), perf_counter() - self._begun_s[stage])


def _longest_token(engine: Engine) -> int:
    """At most so many bytes of text, and so at most so many characters, are one token."""
    return max(len(piece.encode()) for piece in engine.tokenizer.backend.get_vocab(with_added_tokens=True))


def _call(loop: asyncio.AbstractEventLoop, act: Callable[..., None], *args: object) -> None:
    """Have the event loop call `act`; it may be gone by now."""
    try:
        loop.call_soon_threadsafe(act, *args)
    except RuntimeError:
        log.debug("the server ended while it was loading")
