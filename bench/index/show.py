"""Tables that print row by row while a bench runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Table:
    """A table under fixed headings: `columns` maps each row's key to its heading; the first column is the widest."""

    def __init__(self, columns: Mapping[str, str], first_width: int) -> None:
        self._columns = columns
        self._widths = [first_width, *(max(len(heading), 9) for heading in list(columns.values())[1:])]
        self._started = False

    def add(self, row: Mapping[str, Any]) -> None:
        """Print a row, and the headings before the first."""
        if not self._started:
            print(self._line(list(self._columns.values())))
            self._started = True
        print(self._line([_cell(row.get(key)) for key in self._columns]), flush=True)

    def _line(self, cells: list[str]) -> str:
        first, *rest = zip(cells, self._widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
