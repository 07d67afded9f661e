"""One node of the radix tree: an edge of tokens and the pages that hold their KV.

    parent                          start = pages before this edge, on the path from the root
      │ key: [n * S] tokens  <-- int32 bytes, always whole pages
      ▼ pages: [n] page ids
    node ── children, keyed by the first page of their edge

Positions are counted in pages from the root: this node covers [start, end).
"""

from __future__ import annotations

from array import array
from typing import final

from radixkv.retention import Retain
from radixkv.siblings import Siblings

__all__ = ["Account", "Node"]


@final
class Account:
    """What one namespace holds; shared by all nodes of its subtree.

    Attributes:
        key: the namespace's key.
        num_pages: pages in its tree.
        num_evictable: those of them with no lease at or below them.
        num_leased: pages that its leases have reserved and not published.
    """

    __slots__ = ("key", "num_evictable", "num_leased", "num_pages")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.num_pages = 0
        self.num_evictable = 0
        self.num_leased = 0


@final
class Node:
    """An edge of whole pages. Mutable; owned by one `RadixTree`, touched only by it.

    Attributes:
        key: [n * page_size] int32 token ids as bytes; a bytearray once it has grown or shrunk.
        pages: [n] page ids; page i holds the KV of tokens [(start + i) * S, (start + i + 1) * S).
        start: pages on the path before this node.
        parent: the node above; kept when this node leaves the tree, so that a cursor can climb to where it is valid.
        children: first page of the child's key -> child; None while there are none.
        siblings: the keys of `children`, arranged for the neighbour search; kept only where there are many.
        lock_count: live leases that end here.
        guard_count: children with a lease somewhere below, plus one if `lock_count`; > 0 forbids eviction.
        tick: when a request last ended here; a parent learns of its children's uses when they leave.
        time_s: the same moment on the cache's clock.
        born: the tick at which its last pages were inserted.
        uses: requests that ended here, or in children that have left. Of a leaf, every request that used its pages since
            they were inserted, the one that inserted them included.
        mark: what the policy noted of the request that used it last; None where it notes nothing.
        retain: how much requests would like it kept; None: as everything else.
        trimmed: has lost pages from its end. Such a node never grows again, so that what stood at a position of a
            living node is what stands there now, if the position still exists.
        alive: is part of the tree.
        account: its namespace's.
    """

    __slots__ = (
        "account",
        "alive",
        "born",
        "children",
        "guard_count",
        "key",
        "lock_count",
        "mark",
        "pages",
        "parent",
        "retain",
        "siblings",
        "start",
        "tick",
        "time_s",
        "trimmed",
        "uses",
    )

    def __init__(self, account: Account, parent: Node | None, start: int, key: bytes | bytearray, pages: array[int]) -> None:
        self.account = account
        self.parent = parent
        self.start = start
        self.key: bytes | bytearray = key
        self.pages = pages
        self.children: dict[bytes, Node] | None = None
        self.siblings: Siblings | None = None
        self.lock_count = 0
        self.guard_count = 0
        self.tick = 0
        self.time_s = 0.0
        self.born = 0
        self.uses = 0
        self.mark: object = None
        self.retain: Retain | None = None
        self.trimmed = False
        self.alive = True

    @property
    def namespace(self) -> bytes:
        """The key of the namespace it belongs to."""
        return self.account.key

    @property
    def end(self) -> int:
        """Pages on the path up to and with this node."""
        return self.start + len(self.pages)

    def __repr__(self) -> str:
        return f"Node(start={self.start}, pages={self.pages.tolist()}, lock_count={self.lock_count}, tick={self.tick})"
