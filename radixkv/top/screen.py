"""Readings as text for the terminal: every number beside its unit, and nothing made up where there is none ("-")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from radixkv.top.reading import Interval, Pool, Reading

if TYPE_CHECKING:
    from radixkv_client import Histogram

__all__ = ["draw", "percent", "pool_bar", "sparkline"]

_BARS = "▁▂▃▄▅▆▇█"
_BAR_CELLS = 24


def draw(
    url: str,
    reading: Reading | None,
    interval: Interval | None,
    hit_rates: Sequence[float | None] = (),
    trouble: str = "",
) -> RenderableType:
    """Everything, as one renderable.

    Args:
        url: of the server.
        reading: the newest; None: there was none yet.
        interval: from the one before to it.
        hit_rates: of the intervals so far, oldest first.
        trouble: why there is nothing newer; empty where all is well.
    """
    parts: list[RenderableType] = [Text.assemble(("radixkv top ", "bold"), url, f"  {reading.model}" if reading else "")]
    if trouble:
        parts.append(Text(trouble, "bold red"))
    if reading is not None:
        parts.append(_table(reading, interval, hit_rates, "dim" if trouble else ""))
    return Group(*parts)


def _table(reading: Reading, interval: Interval | None, hit_rates: Sequence[float | None], style: str) -> Table:
    counted = interval.counted if interval is not None else None
    seconds = interval.seconds if interval is not None else 0.0
    totals = reading.counters

    def rate(name: str) -> str:
        return f"{getattr(counted, name) / seconds:,.1f}/s" if counted is not None and seconds > 0 else "-"

    table = Table.grid(padding=(0, 2))
    table.style = style
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    table.add_row("requests", f"{reading.running} running   {reading.waiting} waiting   {rate('requests')} ended")
    table.add_row("tokens", f"prompt {rate('prompt_tokens')}   generated {rate('generated_tokens')}")
    now = percent(counted.hit_rate if counted is not None else None)
    table.add_row("hit rate", f"now {now}   in all {percent(totals.hit_rate)}   {sparkline(hit_rates)}")
    table.add_row("pool", pool_bar(reading.pool))
    table.add_row("first token", _quantiles(interval.first if interval is not None else None))
    table.add_row("next token", _quantiles(interval.next if interval is not None else None))
    more = f" (+{counted.preemptions:,.0f})" if counted is not None else ""
    table.add_row("preemptions", f"{totals.preemptions:,.0f}{more}")
    more = f" (+{counted.evicted_tokens:,.0f})" if counted is not None else ""
    table.add_row("evicted", f"{totals.evicted_tokens:,.0f} tokens{more}")
    return table


def percent(share: float | None) -> str:
    """A share as text.

    >>> percent(0.5), percent(None)
    ('50.0 %', '-')
    """
    return "-" if share is None else f"{100 * share:.1f} %"


def sparkline(shares: Sequence[float | None]) -> str:
    """Shares, 0 to 1, as a line of bars; a gap where there was none.

    >>> sparkline([0.0, 0.5, None, 1.0])
    '▁▅ █'
    """
    return "".join(" " if share is None else _BARS[min(int(share * len(_BARS)), len(_BARS) - 1)] for share in shares)


def pool_bar(pool: Pool) -> Text:
    """Held, cached and free pages as a bar, and in numbers."""
    total = max(pool.num_pages, 1)
    held = round(pool.held / total * _BAR_CELLS)
    cached = min(round(pool.cached / total * _BAR_CELLS), _BAR_CELLS - held)
    return Text.assemble(
        ("█" * held, "red"),
        ("▓" * cached, "green"),
        ("░" * (_BAR_CELLS - held - cached), "dim"),
        f"  held {percent(pool.held / total)}, cached {percent(pool.cached / total)} of {pool.num_pages:,} pages",
    )


def _quantiles(times: Histogram | None) -> str:
    return f"p50 {_ms(times, 0.5)}   p99 {_ms(times, 0.99)}"


def _ms(times: Histogram | None, share: float) -> str:
    seconds = times.quantile(share) if times is not None else None
    return "-" if seconds is None else f"{seconds * 1e3:,.0f} ms"
