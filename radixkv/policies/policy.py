"""What the cache asks of an eviction policy, and what it tells one."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from radixkv.node import Node

__all__ = ["Ended", "Policy"]


class Ended(NamedTuple):
    """A request that has just ended, for policies that learn.

    Attributes:
        tick: when.
        time_s: when, on the cache's clock.
        namespace: its namespace's key.
        tag: the caller's opaque small integer.
        tokens: its whole sequence, int32 bytes.
        page_size: tokens in a page.
        num_pages: pages of the path it ends at.
        num_found: whole pages that it found cached when it began.
        num_sought: whole pages that its look-up might have found: those of the prompt it began with, or of its limit.
    """

    tick: int
    time_s: float
    namespace: bytes
    tag: int
    tokens: bytes | bytearray
    page_size: int
    num_pages: int
    num_found: int
    num_sought: int


class Policy(Protocol):
    """An order over the leaves that may be evicted: unlocked, without children.

    A policy never sees page bytes. Nothing but `ended` may look at tokens or time.

    Retention and quotas order leaves by level and namespace, each with a policy of its own (`Levels`). A policy that learns
    may offer `sibling() -> Policy` for them: another order that shares its statistics, and is told of no request itself.
    Where there is no such method, other levels and namespaces get a fresh one of its kind, or LRU where it learns.

    Attributes:
        merges: whether leaves with different histories may become one (`RadixTree.merges`).
        learns: whether `ended` wants to be called; what it costs nobody else pays.
    """

    merges: bool
    learns: bool

    def add(self, leaf: Node) -> None:
        """`leaf` became evictable; its `tick`, `uses` and `mark` say what it was used for."""

    def discard(self, leaf: Node) -> None:
        """`leaf` is evictable no more: locked, grown a child, or gone. It may not have been in the order."""

    def victim(self) -> Node | None:
        """The leaf to lose pages next, still in the order; None when there is none."""

    def ended(self, request: Ended) -> object:
        """Note what a request did; returns the mark of the node it ends in. Called before that node is added."""

    def __len__(self) -> int:
        """Evictable leaves."""

    def __contains__(self, leaf: Node) -> bool:
        """Whether `leaf` is in the order; for checks."""
