"""The process: a socket bound at once, signals, a drain, an exit code.

bind ─▶ serve (the model loads meanwhile) ─▶ SIGTERM ─▶ no new connections ─▶ drain_timeout ─▶ cancel ─▶ exit 0
                                           └ the engine ended, or could not be loaded ─▶ exit 1
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from radixkv_service.app import create_app
from radixkv_service.protocol import ConnectionLimits, GuardedConfig
from radixkv_service.service import Service
from radixkv_service.settings import ServiceSettings

__all__ = ["DrainingServer", "bind", "serve_forever"]

log = logging.getLogger("radixkv.service")

_CANCEL_S = 5.0  # for answers that were cancelled to say so


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which ends with exit code 0 when it is told to.

    Args:
        config: of uvicorn.
        service: what it serves.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM while serving; they are not raised again afterwards."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; one more does not wait."""
        if self.should_exit:
            self.force_exit = True
            self._service.cancel_all()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let what runs finish, cancel what does not."""
        self._service.drain()
        log.info("draining: %d running", len(self._service.running))
        seconds = self._service.settings.drain_timeout
        timer = asyncio.get_running_loop().call_later(seconds, self._service.cancel_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def bind(settings: ServiceSettings) -> socket.socket:
    """Bind the socket, so that a taken port is known before the model is loaded.

    Raises:
        OSError: the address cannot be used.
    """
    family, kind, number, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, number)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def serve_forever(settings: ServiceSettings) -> int:
    """Serve until told to end; returns the exit code.

    Raises:
        ConfigError: settings that cannot be. OSError: the address cannot be used.
    """
    settings.engine_config()
    failures: list[str] = []
    servers: list[DrainingServer] = []

    def fail() -> None:
        failures.append("failed")
        for server in servers:
            server.should_exit = True

    service = Service(settings, on_failure=fail)
    listener = bind(settings)
    host, port = listener.getsockname()[:2]
    if service.keys.made_token is not None:
        sys.stderr.write(f"admin token (made for this run; set --admin-token to choose one): {service.keys.made_token}\n")
    if service.keys.open and settings.hosts == []:
        log.warning("anybody who reaches %s:%d may ask: no API key is set", host, port)
    config = GuardedConfig(
        create_app(service),
        ConnectionLimits(settings.header_timeout, settings.write_timeout),
        timeout_keep_alive=settings.keep_alive_timeout,
        timeout_graceful_shutdown=int(settings.drain_timeout + _CANCEL_S),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    server = DrainingServer(config, service)
    servers.append(server)
    with server.capture_signals():  # before anybody can know that we are here
        log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        asyncio.run(_serve(server, listener))
    if service.still_loading:
        _leave(1 if failures else 0)
    log.info("ended")
    return 1 if failures else 0


async def _serve(server: DrainingServer, listener: socket.socket) -> None:
    await server.serve([listener])


def _leave(code: int) -> Any:
    """End the process beside a loader that cannot be interrupted."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
