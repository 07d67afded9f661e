"""The radix tree: token-exact prefixes over pages.

    root                                     page_size 4, one letter a token
     ├─ "abcdefgh"       pages 0 1           "abcdefgh" + "ijkl" and "abcdefgh" + "mnop" share pages 0 and 1
     │   ├─ "ijkl"       page  2
     │   └─ "mnop"       page  3
     └─ "abcX"           page  4             siblings may share less than a page: they differ in their first one

Three rules make it fast and its counts exact:

1. A match changes nothing. It walks down with one `startswith` (memcmp) an edge; it may end inside an edge, and inside a
   page. Only `insert` and `settle` split.
2. A lease locks the node it ends in, once; that protects every ancestor, because only leaves are evicted. A count of
   guarded children goes up the path only where the first guard appears or the last one goes.
3. A node's tick is set where a request ends. When a leaf goes, its tick is folded into its parent, so a parent that
   becomes a leaf knows when it was last used without having been touched by every request that passed through.

A split keeps the lower half in the old node, so that leases and cursors that end in it stay where they are:

    before   N [A B C D]                 after   U [A B] ── N [C D]

No tensors, no clock, no policy: who may be evicted is reported to `order`, which decides.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final, Protocol, final

from radixkv.match import Insertion, Match, Removal
from radixkv.node import Account, Node
from radixkv.prefix import TOKEN_BYTES, common_prefix_bytes
from radixkv.siblings import Siblings, closest_of

__all__ = ["LeafOrder", "RadixTree"]

_WIDE: Final = 16  # children; from here on their keys are also arranged for the neighbour search


class LeafOrder(Protocol):
    """Who wants to know which leaves may be evicted."""

    def add(self, leaf: Node) -> None:
        """`leaf` may be evicted from now on."""

    def discard(self, leaf: Node) -> None:
        """`leaf` may not be evicted any more."""


@final
class RadixTree:
    """Namespaced radix trees over pages of `page_size` tokens.

    Not thread-safe: its owner (`PrefixCache`) serialises the calls.

    Args:
        page_size: tokens in a page, >= 1.
        order: told of every leaf that becomes, or stops being, evictable.

    Attributes:
        merges: a leaf that requests have ended on may still grow in place. Off, every node is a run of pages with one
            history, which is what policies want that look at more than recency.
        num_pages: pages in the tree.
        num_evictable: pages with no lease at or below them. The others are locked.
        num_nodes: nodes, roots not counted.
    """

    __slots__ = ("_page_bytes", "merges", "num_evictable", "num_nodes", "num_pages", "order", "page_size", "roots")

    def __init__(self, page_size: int, order: LeafOrder) -> None:
        self.page_size = page_size
        self._page_bytes = page_size * TOKEN_BYTES
        self.order = order
        self.merges = True
        self.roots: dict[bytes, Node] = {}
        self.num_pages = 0
        self.num_evictable = 0
        self.num_nodes = 0

    # -- look up ------------------------------------------------------------------------------------------------------

    def root(self, namespace: bytes) -> Node:
        """The root of a namespace, made where it does not exist yet."""
        root = self.roots.get(namespace)
        if root is None:
            root = self.roots[namespace] = Node(Account(namespace), None, 0, b"", array("i"))
        return root

    def match(self, node: Node, position: int, tail: bytes) -> Match:
        """Find the longest cached run of `tail`, which continues the path at `position` inside `node`.

        Cost: O(T) token compares by memcmp; O(log children) at the end for a match inside a page. Mutates nothing.

        Args:
            node: a living node: a root with position 0, or what `climb` returned.
            position: pages from the root, node.start < position <= node.end; `tail` starts there.
            tail: int32 token ids as bytes.
        """
        page_bytes = self._page_bytes
        offset = 0
        if position < node.start + len(node.pages):
            rest = node.key[(position - node.start) * page_bytes :]
            if not tail.startswith(rest):
                return self._inside(node, position, tail, 0, rest)
            offset = len(rest)
        while True:
            children = node.children
            if children is None:
                break
            child = children.get(tail[offset : offset + page_bytes])
            if child is None:
                return self._between(node, tail, offset)
            key = child.key
            if not tail.startswith(key, offset):
                return self._inside(child, child.start, tail, offset, key)
            offset += len(key)
            node = child
        return Match(node, node.start + len(node.pages), -1, 0, node)

    def _inside(self, node: Node, position: int, tail: bytes, offset: int, edge: bytes | bytearray) -> Match:
        """The match that ends inside `edge`, the rest of `node` from `position` on."""
        common = common_prefix_bytes(tail, offset, edge)
        whole = common // self._page_bytes
        tokens = (common - whole * self._page_bytes) // TOKEN_BYTES
        position += whole
        page = node.pages[position - node.start] if tokens else -1
        return Match(node, position, page, tokens, node)

    def _between(self, node: Node, tail: bytes, offset: int) -> Match:
        """The match that ends with `node`, and perhaps inside the first page of the child that is closest to `tail`."""
        end = node.start + len(node.pages)
        if self.page_size == 1:
            return Match(node, end, -1, 0, node)
        assert node.children is not None
        probe = tail[offset : offset + self._page_bytes]
        closest = closest_of(node.children, probe) if node.siblings is None else node.siblings.closest(probe)
        if closest.num_tokens == 0:
            return Match(node, end, -1, 0, node)
        child = node.children[closest.key]
        return Match(node, end, child.pages[0], closest.num_tokens, child)

    def climb(self, node: Node, position: int) -> tuple[Node, int]:
        """The living node, and the position in it, that cover the most of a path that once reached `position` in `node`.

        The position lies beyond the node's start, so a walk that goes on from there sees every sibling.

        A node keeps its parent when it leaves the tree, and what stands at a position of a living node never changes
        while it exists (see `Node.trimmed`), so positions are compared and no tokens. Cost: O(nodes that left).
        """
        while not node.alive:
            position = min(position, node.start)
            if node.parent is None:
                return self.root(node.account.key), 0
            node = node.parent
        position = min(position, node.start + len(node.pages))
        while position <= node.start and node.parent is not None:
            node = node.parent
        return node, position

    def path_pages(self, node: Node, num_pages: int) -> array[int]:
        """[num_pages] page ids from the root to `num_pages`, which lies in `node`. Cost: O(nodes + pages of the path)."""
        parts = [node.pages[: num_pages - node.start]]
        while node.parent is not None:
            node = node.parent
            parts.append(node.pages)
        pages = array("i")
        for part in reversed(parts):
            pages += part
        return pages

    # -- insert -------------------------------------------------------------------------------------------------------

    def insert(self, node: Node, position: int, tail: bytes, pages: array[int], tick: int, own_locks: int) -> Insertion:
        """Add `tail`, whole pages that continue the path at `position` inside `node`.

        What the tree has already is not added again. Four cases, after walking as far as the tree agrees:
            1. all of it is there                      split where it ends, so that its recency is its own
            2. it leaves an edge in the middle         split there, then 4
            3. it continues an unshared leaf           the leaf grows in place, amortised O(new tokens)
            4. it continues any other node             a new child

        Cost: O(T) compares, O(edge) copy for a split, O(log children) for a new child.

        Args:
            node, position, tail: as for `match`; len(tail) = len(pages) whole pages.
            pages: page ids that hold the KV of `tail`; copied.
            tick: when.
            own_locks: how many of `node`'s locks are the caller's own (0 or 1); with others it does not grow in place.
        """
        start, reached, new_key, new_pages = node, 0, tail, pages
        if node.children is not None or position < node.start + len(node.pages):
            found = self.match(node, position, tail)
            start, reached = found.node, found.num_pages - position
            if found.num_pages < start.start + len(start.pages):
                start = self._split(start, found.num_pages)
            if reached == len(pages):
                return Insertion(start, reached)
            if reached:
                new_key, new_pages = tail[reached * self._page_bytes :], pages[reached:]
        self.num_pages += len(new_pages)
        start.account.num_pages += len(new_pages)
        if start.children is None and self._may_grow(start, own_locks if start is node else 0):
            self._grow(start, new_key, new_pages, tick)
            return Insertion(start, reached)
        return Insertion(self._attach(start, new_key, new_pages, tick), reached)

    def end_at(self, node: Node, position: int) -> Node:
        """The node that ends at `position` inside `node`: split there where none does. Cost: O(edge)."""
        return self._split(node, position) if position < node.start + len(node.pages) else node

    def settle(self, node: Node, position: int, tick: int, time_s: float) -> Node:
        """Record that a request ended at `position` inside `node`: split there, so that only what it used is touched."""
        if position < node.start + len(node.pages):
            node = self._split(node, position)
        node.tick = tick
        node.time_s = time_s
        node.uses += 1
        return node

    def _may_grow(self, leaf: Node, own_locks: int) -> bool:
        return (
            leaf.parent is not None
            and leaf.lock_count == own_locks
            and not leaf.trimmed
            and leaf.retain is None
            and (self.merges or leaf.uses == 0)
        )

    def _split(self, node: Node, position: int) -> Node:
        """Cut `node` at `position`; return the new upper half. The lower half stays `node`, with its locks."""
        parent = node.parent
        assert parent is not None and parent.children is not None
        if position == node.start:
            return parent
        count = position - node.start
        cut = count * self._page_bytes
        first = bytes(node.key[: self._page_bytes])
        upper = Node(node.account, parent, node.start, node.key[:cut], node.pages[:count])
        upper.tick, upper.time_s, upper.born, upper.mark = node.tick, node.time_s, node.born, node.mark
        upper.retain = node.retain
        upper.guard_count = 1 if node.guard_count else 0
        node.key = node.key[cut:]
        del node.pages[:count]
        node.start = position
        node.parent = upper
        upper.children = {bytes(node.key[: self._page_bytes]): node}
        parent.children[first] = upper
        self.num_nodes += 1
        return upper

    def _grow(self, node: Node, key: bytes, pages: array[int], tick: int) -> None:
        if isinstance(node.key, bytes):
            node.key = bytearray(node.key)
        node.key += key
        node.pages += pages
        free = node.guard_count == 0
        if free:
            self.order.discard(node)
            self.num_evictable += len(pages)
            node.account.num_evictable += len(pages)
        node.tick = node.born = tick
        if free:
            self.order.add(node)

    def _attach(self, parent: Node, key: bytes, pages: array[int], tick: int) -> Node:
        node = Node(parent.account, parent, parent.start + len(parent.pages), key, pages[:])
        node.tick = node.born = tick
        first = key[: self._page_bytes]
        if parent.children is None:
            parent.children = {first: node}
            if parent.parent is not None and parent.lock_count == 0:
                self.order.discard(parent)
        else:
            parent.children[first] = node
            if parent.siblings is not None:
                parent.siblings.add(first)
            elif len(parent.children) > _WIDE:
                parent.siblings = Siblings(parent.children)
        self.num_nodes += 1
        self.num_evictable += len(pages)
        node.account.num_evictable += len(pages)
        self.order.add(node)
        return node

    # -- lock ---------------------------------------------------------------------------------------------------------

    def lock(self, node: Node) -> None:
        """Protect `node`, and so all above it. Cost: O(1), plus the unguarded part of the path when it is the first."""
        node.lock_count += 1
        if node.lock_count > 1:
            return
        if node.children is None and node.parent is not None:
            self.order.discard(node)
        above: Node | None = node
        while above is not None:
            above.guard_count += 1
            if above.guard_count > 1:
                return
            num_pages = len(above.pages)
            self.num_evictable -= num_pages
            above.account.num_evictable -= num_pages
            above = above.parent

    def unlock(self, node: Node) -> None:
        """Take one lock back. Cost: as `lock`."""
        assert node.lock_count > 0, node
        node.lock_count -= 1
        if node.lock_count > 0:
            return
        above: Node | None = node
        while above is not None:
            above.guard_count -= 1
            if above.guard_count > 0:
                break
            num_pages = len(above.pages)
            self.num_evictable += num_pages
            above.account.num_evictable += num_pages
            above = above.parent
        if node.children is None:
            self._leaf_free(node)

    # -- evict and remove ---------------------------------------------------------------------------------------------

    def trim(self, leaf: Node, num_pages: int) -> array[int]:
        """Take up to `num_pages` pages off the end of an evictable leaf; return them. An emptied leaf leaves the tree.

        Cost: O(pages taken), O(log children) when it leaves.
        """
        assert leaf.children is None and leaf.lock_count == 0 and leaf.parent is not None, leaf
        keep = len(leaf.pages) - num_pages
        if keep <= 0:
            pages = leaf.pages
            self._detach(leaf)
        else:
            pages = leaf.pages[keep:]
            del leaf.pages[keep:]
            if isinstance(leaf.key, bytes):
                leaf.key = bytearray(leaf.key)
            del leaf.key[keep * self._page_bytes :]
            leaf.trimmed = True
        self.num_pages -= len(pages)
        self.num_evictable -= len(pages)
        leaf.account.num_pages -= len(pages)
        leaf.account.num_evictable -= len(pages)
        return pages

    def remove(self, node: Node, position: int, probe: bytes = b"") -> Removal:
        """Take out all that continues the path beyond `position` inside `node`, except what leases hold.

        Only what goes on with `probe`, less than a page of tokens, is taken. Cost: O(subtree).
        """
        if position < node.start + len(node.pages):
            if not node.key.startswith(probe, (position - node.start) * self._page_bytes):
                return Removal(array("i"), 0)
            self._split(node, position)
            tops = [node]
        else:
            tops = [child for first, child in (node.children or {}).items() if first.startswith(probe)]
        taken = array("i")
        num_locked = 0
        members = [member for top in tops for member in self.walk(top)]
        for member in reversed(members):  # a walk lists parents first, so leaves come first here
            if member.guard_count:
                num_locked += len(member.pages)
            else:
                taken += self.trim(member, len(member.pages))
        return Removal(taken, num_locked)

    def _detach(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None and parent.children is not None
        first = bytes(leaf.key[: self._page_bytes])
        self.order.discard(leaf)
        del parent.children[first]
        if parent.siblings is not None:
            parent.siblings.remove(first)
        leaf.alive = False
        self.num_nodes -= 1
        parent.uses += leaf.uses
        if leaf.tick > parent.tick:
            parent.tick, parent.time_s, parent.mark = leaf.tick, leaf.time_s, leaf.mark
        if not parent.children:
            parent.children = None
            parent.siblings = None
            if parent.lock_count == 0:
                self._leaf_free(parent)

    def _leaf_free(self, node: Node) -> None:
        """`node` has no children and no locks any more: it may be evicted, or, as a root, forgotten."""
        if node.parent is not None:
            self.order.add(node)
        else:
            node.alive = False
            del self.roots[node.account.key]

    # -- look at ------------------------------------------------------------------------------------------------------

    def walk(self, top: Node | None = None) -> Iterator[Node]:
        """Every node below and with `top` (all of them by default, roots too), parents first."""
        stack = [top] if top is not None else list(self.roots.values())
        while stack:
            node = stack.pop()
            yield node
            if node.children is not None:
                stack.extend(node.children.values())
