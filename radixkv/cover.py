"""Which pages of the tree lie on given paths, each counted once however many paths share it.

ends (N, 5), (M, 3)        root ── U [0, 2) ─┬─ N [2, 6)      covers U to 2, N to 5, M to 3
                                             └─ M [2, 4)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from radixkv.node import Node

__all__ = ["PathEnd", "by_namespace", "cover", "num_covered"]


class PathEnd(NamedTuple):
    """A path from the root to `position`, counted in pages, which lies in `node`."""

    node: Node
    position: int


def cover(ends: Iterable[PathEnd]) -> dict[Node, int]:
    """Each node on the paths, roots included, and the position up to which they reach in it. Cost: O(those nodes)."""
    reached: dict[Node, int] = {}
    for end in ends:
        node: Node | None = end.node
        position = end.position
        while node is not None and reached.get(node, -1) < position:
            reached[node] = position
            position = node.start
            node = node.parent
    return reached


def num_covered(reached: dict[Node, int]) -> int:
    """Pages on the paths. Cost: O(nodes)."""
    return sum(position - node.start for node, position in reached.items())


def by_namespace(reached: dict[Node, int]) -> dict[bytes, int]:
    """Pages on the paths, by the key of their namespace. Cost: O(nodes)."""
    counts: dict[bytes, int] = {}
    for node, position in reached.items():
        key = node.account.key
        counts[key] = counts.get(key, 0) + position - node.start
    return counts
