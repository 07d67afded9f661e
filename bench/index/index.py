"""What is measured: an index of prompts, ours or another's, behind one small interface.

    prepare(request)   the prompt in the form this index takes: the caller's work, never timed
    lookup(given)      key building or hashing, longest match, and whatever holds it in place; returns hit tokens
    compute()          what an engine does in between, never timed
    insert()           the whole prompt enters the index after that look-up, and nothing holds it any more
    evict(num_tokens)  one call that frees at least so many tokens and returns how many; not every index has it

`INDEXES` names every one of them by where it is made, so that only the one that is measured is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np

from bench.index.workloads import PAGE, Request


class Index(Protocol):
    """An index of prompts with a fixed capacity."""

    page_size: int  # tokens: prompts are stored in whole pages
    exact: bool  # whether a hit may end inside a stored page
    keep_last: bool  # whether a prompt's last token is never a hit
    evicts: bool  # whether it keeps to its capacity

    def prepare(self, request: Request) -> Any:
        """The prompt as its caller would hold it."""
        ...

    def lookup(self, given: Any) -> int:
        """Find and hold the longest cached prefix; returns its tokens."""
        ...

    def compute(self) -> None:
        """Make ready what an insert is given."""
        ...

    def insert(self) -> None:
        """Store the rest of the prompt that was just looked up, and let go of it."""
        ...

    def num_cached(self) -> int:
        """Tokens stored."""
        ...

    def check(self) -> None:
        """Look for broken invariants, where the index knows how."""
        ...


class Evicting(Index, Protocol):
    """An index with a call to evict."""

    def evict(self, num_tokens: int) -> int:
        """Free at least `num_tokens` tokens in one call; returns how many."""
        ...


@dataclass(frozen=True, slots=True)
class Made:
    """How an index is made.

    Attributes:
        where: its module and its factory: (capacity_tokens, num_sessions, form) to an `Index`.
        form: how tokens are given to it.
        package: its distribution, whose version goes beside its numbers; empty for ours.
        note: what a reader has to know beside its numbers.
    """

    where: str
    form: str
    package: str = ""
    note: str = ""

    def make(self, capacity_tokens: int, num_sessions: int = 0) -> Any:
        """Import and make it: an `Index`, or an `Evicting` one."""
        module, factory = self.where.split(":")
        return getattr(import_module(module), factory)(capacity_tokens, num_sessions, self.form)

    def about(self) -> dict[str, str]:
        """What exactly is measured: a rival's version; whether our core is compiled or runs from source."""
        if self.package:
            return {"version": version(self.package)}
        path = str(import_module("radixkv.cache").__file__)
        return {"core": "source" if path.endswith(".py") else "compiled"}

    def warm_up(self) -> None:
        """Import all it imports and touch what it touches, so that what is weighed afterwards is the index alone."""
        index = self.make(64 * PAGE, 1)
        for num_tokens in (2 * PAGE, 8 * PAGE):
            index.lookup(index.prepare(Request(np.arange(num_tokens, dtype=np.int32), 0)))
            index.compute()
            index.insert()


OURS = "bench.index.radix:RadixIndex"
INDEXES = {
    "tokens": Made(OURS, "Tokens"),
    "array": Made(OURS, "int32 array"),
    "list": Made(OURS, "list[int]"),
    "cursor": Made(OURS, "cursor"),
}
"""radixkv by the form tokens are given in; bench.rivals adds others."""


def named(name: str) -> Made:
    """The index of that name, rivals included."""
    if name not in INDEXES:
        return import_module("bench.rivals.indexes").RIVALS[name]  # type: ignore[no-any-return]
    return INDEXES[name]
