"""A replay's plot as a PNG file; the one thing here that needs matplotlib."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from radixkv.replay.chart import COLOURS, short_number
from radixkv.replay.errors import PlotUnavailable
from radixkv.replay.report import Report

__all__ = ["load_matplotlib", "write_png"]


def load_matplotlib() -> Any:
    """The module matplotlib.figure, whose `Figure` draws without a display.

    Raises:
        PlotUnavailable: matplotlib is not installed.
    """
    try:
        return import_module("matplotlib.figure")
    except ImportError:
        raise PlotUnavailable("matplotlib", "plot") from None


def write_png(report: Report, path: Path) -> None:
    """Draw page hit rate by capacity and policy.

    Raises:
        PlotUnavailable: matplotlib is not installed. OSError: `path` cannot be written.
    """
    figure = load_matplotlib().Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for colour, line in zip(COLOURS, report.series(), strict=False):
        pages = [point[0] for point in line.points]
        rates = [100 * point[1] for point in line.points]
        style = "none" if not line.joined else "--" if line.dashed else "-"
        mark = "o" if line.titles else ""
        axes.plot(pages, rates, linestyle=style, marker=mark, color=colour, linewidth=2 if mark else 1.2, label=line.name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.set_xlabel(f"capacity, pages of {report.workload.page_size} tokens")
    axes.set_ylabel("page hit rate, %")
    axes.set_ylim(bottom=0)
    axes.set_title(", ".join(report.files), fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")
