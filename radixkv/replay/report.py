"""A replay's result for people and machines: a table, and a JSON object with the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from radixkv.replay.cost import Gpu, ModelShape, Saving, saving
from radixkv.replay.curve import Curve
from radixkv.replay.rows import Row
from radixkv.replay.workload import Workload

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Report", "ReportRow", "Series"]


@dataclass(frozen=True, slots=True)
class ReportRow:
    """A row as it is shown.

    Attributes:
        label: the capacity as it was asked for, "5%" say.
        row: the counts.
        saved: what the hits are worth.
        gap_closed: where it lies between LRU (0) and the optimum (1); None without a `min` row or without a gap.
    """

    label: str
    row: Row
    saved: Saving
    gap_closed: float | None


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a plot.

    Attributes:
        name: the policy.
        points: (capacity in pages, page hit rate), by capacity.
        titles: one text for each point; none for a line without marks.
        dashed: how its line is drawn.
        joined: whether it has a line at all; the exact curve is LRU's.
    """

    name: str
    points: Sequence[tuple[int, float]]
    titles: Sequence[str] = ()
    dashed: bool = False
    joined: bool = True


@dataclass(slots=True)
class Report:
    """All that a replay found; rows are added as they come.

    Attributes:
        files: the traces' names.
        workload: its totals.
        curve: exact LRU.
        model, shape: the model's name and sizes.
        gpu, peak: the GPU's name and speed.
        utilisation: assumed share of that speed.
        results: (capacity as asked, row).
        complete: False if the replay was interrupted.
        tag_accuracy: how often the requests' tags were right; None without tags.
    """

    files: Sequence[str]
    workload: Workload
    curve: Curve
    model: str
    shape: ModelShape
    gpu: str
    peak: Gpu
    utilisation: float
    results: list[tuple[str, Row]] = field(default_factory=list)
    complete: bool = True
    tag_accuracy: float | None = None

    def rows(self) -> list[ReportRow]:
        """Every row with what it is worth, and how much of the gap it closes."""
        best = {row.capacity_pages: row.page_hit_rate for _, row in self.results if row.policy == "min"}
        shown = []
        for label, row in self.results:
            lru = self.curve.page_hit_rate(row.capacity_pages)
            gap = best.get(row.capacity_pages, lru) - lru
            closed = (row.page_hit_rate - lru) / gap if gap > 0 else None
            shown.append(ReportRow(label, row, saving(row, self.shape, self.peak, self.utilisation), closed))
        return shown

    def capacity_bytes(self, row: Row) -> int:
        """KV bytes of the row's capacity, on the model."""
        return row.capacity_pages * row.page_size * self.shape.kv_bytes_per_token

    def facts(self) -> dict[str, Any]:
        """What the traces are."""
        workload = self.workload
        return {
            "files": list(self.files),
            "page_size": workload.page_size,
            "requests": workload.num_requests,
            "duration_s": round(workload.duration_s, 3),
            "input_tokens": workload.num_input_tokens,
            "output_tokens": workload.num_output_tokens,
            "input_pages": workload.num_input_pages,
            "footprint_pages": workload.num_pages,
        }

    def cost(self) -> dict[str, Any]:
        """What savings are counted on, and what all prefills cost without a cache."""
        flops = self.shape.prefill_flops(self.workload.num_input_tokens, self.workload.input_pairs)
        return {
            "model": self.model,
            "kv_bytes_per_token": self.shape.kv_bytes_per_token,
            "gpu": self.gpu,
            "peak_tflops": self.peak.peak_tflops,
            "utilisation": self.utilisation,
            "prefill_flops": flops,
            "prefill_gpu_hours": self.peak.seconds(flops, self.utilisation) / 3600,
        }

    def as_json(self) -> dict[str, Any]:
        """The whole report; rates lie in 0..1."""
        return {
            "trace": self.facts(),
            "cost": self.cost(),
            "complete": self.complete,
            "tag_accuracy": self.tag_accuracy,
            "rows": [self._json_row(one) for one in self.rows()],
            "lru_curve": [
                {
                    "capacity_pages": pages,
                    "page_hit_rate": self.curve.page_hit_rate(pages),
                    "token_hit_rate": self.curve.row(pages).token_hit_rate,
                }
                for pages in self.curve.knots()
            ],
        }

    def _json_row(self, one: ReportRow) -> dict[str, Any]:
        row = one.row
        return {
            "policy": row.policy,
            "capacity": one.label,
            "capacity_pages": row.capacity_pages,
            "capacity_bytes": self.capacity_bytes(row),
            "page_hit_rate": row.page_hit_rate,
            "token_hit_rate": row.token_hit_rate,
            "gap_closed": one.gap_closed,
            "requests": row.requests,
            "hit_requests": row.hit_requests,
            "input_pages": row.input_pages,
            "hit_pages": row.hit_pages,
            "hit_tokens": row.hit_tokens,
            "evicted_pages": row.evicted_pages,
            "uncached_pages": row.uncached_pages,
            "flops_saved": one.saved.flops,
            "flops_saved_share": one.saved.share,
            "gpu_seconds_saved": one.saved.gpu_seconds,
            "gpu_hours_saved": one.saved.gpu_hours,
            "cpu_seconds": row.cpu_s,
            "requests_per_s": row.requests_per_s,
        }

    def series(self) -> list[Series]:
        """Lines for a plot: the exact LRU curve, then each policy."""
        knots = self.curve.knots()
        lines = [Series("lru, exact curve", [(pages, self.curve.page_hit_rate(pages)) for pages in knots])]
        shown = sorted(self.rows(), key=lambda one: one.row.capacity_pages)
        for policy in dict.fromkeys(row.policy for _, row in self.results):
            mine = [one for one in shown if one.row.policy == policy]
            points = [(one.row.capacity_pages, one.row.page_hit_rate) for one in mine]
            titles = [self._title(one) for one in mine]
            lines.append(Series(policy, points, titles, dashed=policy == "min", joined=policy != "lru"))
        return lines

    def _title(self, one: ReportRow) -> str:
        row = one.row
        return (
            f"{row.policy} at {one.label}: {row.capacity_pages:,} pages, {_figure(self.capacity_bytes(row) / 2**30)} GiB; "
            f"page hit rate {row.page_hit_rate:.2%}, prefill FLOPs saved {one.saved.share:.2%}, "
            f"{_figure(one.saved.gpu_hours)} GPU-hours"
        )

    def headline(self) -> str:
        """The workload in a sentence, and what is assumed about cost in another."""
        workload, cost = self.workload, self.cost()
        return (
            f"{workload.num_requests:,} requests, {workload.num_input_tokens:,} prompt tokens over "
            f"{workload.duration_s / 60:.0f} minutes; {workload.num_pages:,} distinct pages of "
            f"{workload.page_size} tokens. "
            f"Savings on {self.model} and {self.gpu} at {self.utilisation:.0%} of {self.peak.peak_tflops:g} TFLOP/s; "
            f"all prefills without a cache take {_figure(cost['prefill_gpu_hours'])} GPU-hours."
        )

    def table(self) -> Table:
        """The rows as a table, a section for each capacity."""
        from rich.table import Table

        table = Table(title=", ".join(self.files), caption=self.headline(), caption_justify="left")
        for name in COLUMNS:
            table.add_column(name, justify="left" if name in ("policy", "capacity") else "right", no_wrap=True)
        shown = self.rows()
        for index, one in enumerate(shown):
            last = index + 1 == len(shown) or shown[index + 1].row.capacity_pages != one.row.capacity_pages
            table.add_row(*self.cells(one), end_section=last)
        return table

    def cells(self, one: ReportRow) -> list[str]:
        """One row's texts, under `COLUMNS`."""
        row = one.row
        return [
            one.label,
            f"{row.capacity_pages:,}",
            _figure(self.capacity_bytes(row) / 2**30),
            row.policy,
            f"{100 * row.page_hit_rate:.2f}",
            f"{100 * row.token_hit_rate:.2f}",
            "" if one.gap_closed is None else f"{100 * one.gap_closed:+.0f}",
            f"{100 * one.saved.share:.2f}",
            _figure(one.saved.gpu_hours),
            f"{row.evicted_pages:,}",
            f"{row.requests_per_s:,.0f}" if row.policy != "min" else "",
        ]


COLUMNS = (
    "capacity",
    "pages",
    "GiB",
    "policy",
    "page hit %",
    "token hit %",
    "gap closed %",
    "FLOPs saved %",
    "GPU-hours saved",
    "evicted pages",
    "requests/s",
)
"""Headings of the table."""


def _figure(value: float) -> str:
    """Three digits, more above a thousand."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
