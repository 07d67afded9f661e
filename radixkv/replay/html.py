"""A replay's report as one HTML file: chart, table, and what was assumed. It loads nothing."""

from __future__ import annotations

from html import escape

from radixkv.replay.chart import chart
from radixkv.replay.report import COLUMNS, Report

__all__ = ["render_html"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child, th:nth-child(4), td:nth-child(4) { text-align: left; }
.scroll { overflow-x: auto; }
"""


def render_html(report: Report) -> str:
    """The page as text. Cost: small; a few kB and 400 B a row."""
    title = f"radixkv replay: {', '.join(report.files)}"
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in report.cells(one)) + "</tr>" for one in report.rows()
    )
    note = "" if report.complete else "<p><strong>Interrupted: rows are missing.</strong></p>"
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<p>{escape(report.headline())}</p>{note}
<h2>Page hit rate by capacity</h2>
{chart(report.series())}
<p>The thin line is leaf-first LRU at every capacity (exact, one pass); marks are replays through the cache itself;
<em>min</em> is the most that any policy could hit, knowing the future.</p>
<h2>Numbers</h2>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>
{rows}
</tbody></table></div>
</body></html>
"""
