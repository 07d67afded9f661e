"""What can go wrong in a replay.

RadixKVError
└── ReplayError
    ├── TraceError          a line of a trace cannot be read; names file, line and field
    └── PlotUnavailable     a plot was asked for and the package that draws it is missing
"""

from __future__ import annotations

from radixkv.errors import RadixKVError

__all__ = ["PlotUnavailable", "ReplayError", "TraceError"]


class ReplayError(RadixKVError):
    """Base of the errors of replays."""


class TraceError(ReplayError, ValueError):
    """A trace that cannot be read.

    Attributes:
        file: the path as it was given.
        line: its number, from 1; 0 where the file as a whole is meant.
        field: which field of the line, `hash_ids[3]` say; empty where the line as a whole is meant.
        reason: what is wrong with it.
    """

    file: str
    line: int
    field: str
    reason: str

    def __init__(self, file: str, line: int, field: str, reason: str) -> None:
        where = file + (f", line {line}" if line else "") + (f", field {field}" if field else "")
        super().__init__(f"{where}: {reason}", file=file, line=line, field=field, reason=reason)


class PlotUnavailable(ReplayError):
    """matplotlib, which draws PNG plots, is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"--plot needs the package {package!r}: pip install 'radixkv[{extra}]'; --html needs nothing more",
            package=package,
            extra=extra,
        )
