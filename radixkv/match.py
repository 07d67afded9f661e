"""Match, Insertion, Removal, Probe: what the tree and the cache answer."""

from __future__ import annotations

from array import array
from typing import NamedTuple, final

from radixkv.node import Node

__all__ = ["Insertion", "Match", "Probe", "Removal"]


@final
class Match:
    """Where the longest cached prefix ends. Never changed once made.

    Attributes:
        node: the node it ends in; the root when nothing matched.
        num_pages: whole pages matched, counted from the root; lies in [node.start, node.end].
        partial_page: a page whose first `partial_tokens` tokens continue the match, or -1.
        partial_tokens: tokens of it that match, 0 <= partial_tokens < page_size.
        partial_node: the node that holds `partial_page`; `node` when there is none.
    """

    __slots__ = ("node", "num_pages", "partial_node", "partial_page", "partial_tokens")

    def __init__(self, node: Node, num_pages: int, partial_page: int, partial_tokens: int, partial_node: Node) -> None:
        self.node = node
        self.num_pages = num_pages
        self.partial_page = partial_page
        self.partial_tokens = partial_tokens
        self.partial_node = partial_node

    def cut(self, limit: int, page_size: int) -> Match:
        """Shortened to `limit` tokens, which are fewer than it has. Cost: O(nodes it climbs)."""
        whole, tokens = divmod(limit, page_size)
        if self.num_pages <= whole:
            tokens = min(tokens, self.partial_tokens) if self.num_pages == whole else self.partial_tokens
            page = self.partial_page if tokens else -1
            return Match(self.node, self.num_pages, page, tokens, self.partial_node if tokens else self.node)
        node = _reaching(self.node, whole + 1)  # holds the page with index `whole`
        if tokens:
            return Match(node, whole, node.pages[whole - node.start], tokens, node)
        node = _reaching(node, whole)
        return Match(node, whole, -1, 0, node)


@final
class Insertion:
    """What an insert did. Never changed once made.

    Attributes:
        node: the node that now ends exactly where the inserted tokens end.
        num_duplicate: leading pages that the tree had already; the caller keeps those it handed in.
    """

    __slots__ = ("node", "num_duplicate")

    def __init__(self, node: Node, num_duplicate: int) -> None:
        self.node = node
        self.num_duplicate = num_duplicate


class Removal(NamedTuple):
    """What `remove` did: the pages that left the tree, and how many stay because leases hold them."""

    pages: array[int]
    num_locked: int


class Probe(NamedTuple):
    """What a prompt would find: its cached tokens, and how many leading ones of those stand in pages that are locked."""

    num_matched: int
    num_locked: int


def _reaching(node: Node, position: int) -> Node:
    """The node on the path to `node` that the page before `position` lies in; the root for 0."""
    while position <= node.start and node.parent is not None:
        node = node.parent
    return node
