"""The command `top`: read, draw, wait, again; a server that is gone is said to be gone until it is back."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from radixkv.top.reading import Interval, Reading, between, read
from radixkv.top.screen import draw

if TYPE_CHECKING:
    from rich.console import RenderableType

    from radixkv_client import Client

__all__ = ["Watch", "top"]

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

_KEPT = 60  # intervals in the sparkline
_LOADING = "the server has no engine yet: its model is being loaded"


def top(
    url: Annotated[str, typer.Option(help="The server's address.")] = "http://127.0.0.1:8100",
    interval: Annotated[float, typer.Option(help="Seconds between two readings.", min=0.1, max=3600)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one interval and leave; so it is, too, in a pipe.")] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="RADIXKV_API_KEY", help="A key or the admin token, if /metrics needs one.")
    ] = None,
) -> None:
    """Watch a server: requests, tokens a second, hit rate, pool, latencies; from its /metrics, and nothing else."""
    try:
        from radixkv_client import Client, ClientError
    except ImportError as missing:
        raise SystemExit(f"top needs the package {missing.name!r}: pip install 'radixkv[client]'") from None
    try:
        with Client(url, api_key, timeout=max(5.0, interval)) as client:
            watch = Watch(client)
            if once or not out.is_terminal:
                _print_once(watch, interval)
            else:
                _live(watch, interval)
    except ClientError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        sys.stdout.flush()


class Watch:
    """The readings so far.

    Args:
        client: the server.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._reading: Reading | None = None
        self._interval: Interval | None = None
        self._hit_rates: deque[float | None] = deque(maxlen=_KEPT)
        self.trouble = ""

    def read(self) -> None:
        """Read once more.

        Raises:
            ClientError: there is nothing to be read; what was read before stays.
        """
        metrics = self._client.metrics()
        reading = read(metrics, time.monotonic())
        self.trouble = "" if reading is not None else _LOADING
        if reading is not None:
            self._interval = between(self._reading, reading) if self._reading is not None else None
            if self._interval is not None:
                self._hit_rates.append(self._interval.counted.hit_rate)
        self._reading = reading

    def lost(self, error: Exception) -> None:
        """There is nothing to be read: what was read last stays, and is said to be old."""
        age = f"; last read {time.monotonic() - self._reading.at_s:.0f} s ago" if self._reading is not None else ""
        self.trouble = f"{error}{age}"

    def draw(self) -> RenderableType:
        """All of it."""
        return draw(self._client.base_url, self._reading, self._interval, list(self._hit_rates), self.trouble)


def _print_once(watch: Watch, interval: float) -> None:
    watch.read()
    time.sleep(interval)
    watch.read()
    out.print(watch.draw())


def _live(watch: Watch, interval: float) -> None:
    from rich.live import Live

    from radixkv_client import ClientError

    with Live(console=out, auto_refresh=False) as live:
        while True:
            try:
                watch.read()
            except ClientError as error:
                watch.lost(error)
            live.update(watch.draw(), refresh=True)
            time.sleep(interval)
