"""`radixkv top`: a server's counts, live in the terminal.

/metrics ──▶ Reading ──▶ Interval (of two readings) ──▶ screen
"""

from radixkv.top.command import top

__all__ = ["top"]
