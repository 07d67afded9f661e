"""A line chart as SVG text: hit rate by capacity. No script, no font, no file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

from radixkv.replay.report import Series

__all__ = ["COLOURS", "chart", "short_number"]

COLOURS = ("#8a8a8a", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5a3c", "#5e4fa2")
"""Okabe and Ito's palette and three more; a chart's lines take them in order."""

_WIDTH, _HEIGHT = 880, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 150, 20, 52


@dataclass(frozen=True, slots=True)
class _Scale:
    """Capacity (logarithmic) and hit rate to pixels."""

    low: float
    high: float
    top: float

    def x(self, pages: float) -> float:
        span = max(log10(self.high / self.low), 1e-9)
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * log10(max(pages, 1) / self.low) / span

    def y(self, rate: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * rate / self.top


def chart(lines: Sequence[Series]) -> str:
    """Draw `lines`: the first thin and without marks, the others with a mark and a hover text at each point."""
    pages = [max(point[0], 1) for line in lines for point in line.points]
    rates = [point[1] for line in lines for point in line.points]
    low, high = min(pages, default=1), max(pages, default=10)
    scale = _Scale(low, high if high > low else low * 10, max(ceil(max(rates, default=1.0) * 10) / 10, 0.1))
    body = [*_axes(scale)]
    for index, line in enumerate(lines):
        body += _line(line, COLOURS[index % len(COLOURS)], scale)
        body += _key(line.name, index, COLOURS[index % len(COLOURS)])
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Page hit rate by capacity and policy" '
        'xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" font-size="13" fill="currentColor">\n'
        + "\n".join(body)
        + "\n</svg>"
    )


def short_number(value: float) -> str:
    """A tick's label: 200, 5k, 1M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def _axes(scale: _Scale) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for step in range(round(scale.top * 10) + 1):
        y = scale.y(step / 10)
        parts.append(
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="currentColor" stroke-opacity=".15"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{step * 10} %</text>')
    for tick in _ticks(scale.low, scale.high):
        x = scale.x(tick)
        parts.append(
            f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}" stroke="currentColor" stroke-opacity=".15"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{short_number(tick)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">capacity, pages (logarithmic)</text>')
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or the powers alone where those would crowd."""
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def _line(line: Series, colour: str, scale: _Scale) -> list[str]:
    path = " ".join(f"{scale.x(pages):.1f},{scale.y(rate):.1f}" for pages, rate in line.points)
    dash = ' stroke-dasharray="7 4"' if line.dashed else ""
    width = 2 if line.titles else 1.5
    parts = []
    if line.joined:
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>')
    for (pages, rate), title in zip(line.points, line.titles, strict=False):
        parts.append(
            f'<circle cx="{scale.x(pages):.1f}" cy="{scale.y(rate):.1f}" r="5" fill="{colour}">'
            f"<title>{escape(title)}</title></circle>"
        )
    return parts


def _key(name: str, index: int, colour: str) -> list[str]:
    x, y = _WIDTH - _RIGHT + 16, _TOP + 14 + 22 * index
    return [
        f'<line x1="{x}" y1="{y}" x2="{x + 20}" y2="{y}" stroke="{colour}" stroke-width="3"/>',
        f'<text x="{x + 26}" y="{y + 4}">{escape(name)}</text>',
    ]
