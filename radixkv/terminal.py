"""What the commands that hold a conversation share: where they print, the lines a person types, and what stops a turn.

for text in typed_lines():              until /exit, /quit, Ctrl-D, or Ctrl-C where nothing runs
    with one_turn(SomeError, "..."):    Ctrl-C and SomeError end the turn, not the conversation
        answer(text)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape

__all__ = ["Rewindable", "err", "one_turn", "out", "rewind", "show_error", "typed_lines"]

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

_COUNT = re.compile("[0-9]{1,9}")  # not str.isdigit: that takes digits int() does not read, and numbers of any length


class Rewindable(Protocol):
    """A conversation that can undo its last turns: one held here, or one held with a server."""

    @property
    def num_turns(self) -> int:
        """Finished turns."""

    def rewind(self, turns: int, /) -> None:
        """Undo the last turns."""


def typed_lines() -> Iterator[str]:
    """Ask for lines, one after another, until the person leaves; empty ones are asked for again.

    Yields: what was typed, without the white space around it; never empty, never /exit or /quit.
    """
    while True:
        try:
            text = out.input("[bold green]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if text in ("/exit", "/quit"):
            return
        if text:
            yield text


@contextmanager
def one_turn(error: type[Exception], stopped: str) -> Iterator[None]:
    """Around whatever one line asks for: Ctrl-C and errors of one kind end that, and are said; the conversation goes on.

    Args:
        error: what a turn may end with; anything else passes.
        stopped: what Ctrl-C leaves behind, in words.
    """
    try:
        yield
    except KeyboardInterrupt:
        out.print(f"\n[dim]stopped; {stopped}[/]")
    except error as caught:
        show_error(str(caught))


def rewind(talk: Rewindable, count: str) -> None:
    """Do `/rewind count`, and say how many turns are left; an empty `count` is one turn.

    Raises: what the conversation's own `rewind` raises.
    """
    if not _COUNT.fullmatch(count or "1"):
        out.print("[dim]/rewind takes a number of turns[/]")
        return
    talk.rewind(int(count or 1))
    out.print(f"[dim]{talk.num_turns} turns left[/]")


def show_error(message: str) -> None:
    """One line on stderr: what went wrong, without a traceback."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
