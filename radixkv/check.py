"""check(): every invariant of docs/invariants.md that can be recounted, recounted."""

from __future__ import annotations

from radixkv.allocator import Allocator
from radixkv.errors import InvariantError
from radixkv.lease import Lease
from radixkv.leasing import Leasing
from radixkv.node import Node
from radixkv.pins import Pins
from radixkv.prefix import TOKEN_BYTES
from radixkv.tree import RadixTree

__all__ = ["check_cache", "check_tree"]


def check_cache(allocator: Allocator, leasing: Leasing) -> None:
    """Recount everything and compare. Cost: O(pages + nodes).

    Raises:
        InvariantError: one is broken.
    """
    allocator.pool.check()
    check_tree(allocator.tree)
    leases, pins = tuple(leasing.leases.values()), leasing.pins
    _check_pages(allocator, leases, leasing.num_leased)
    if pins.num_pages != pins.count():
        raise InvariantError("I4", pinned=pins.count(), kept=pins.num_pages)
    _check_locks(allocator, leases, pins)
    _check_levels(allocator)


def check_tree(tree: RadixTree) -> None:
    """Recount everything and compare. Cost: O(tree).

    Raises:
        InvariantError: I2, I3, I4, I7 or I8 (docs/invariants.md) is broken.
    """
    num_pages = num_evictable = num_nodes = 0
    for name, root in tree.roots.items():
        if root.namespace != name or root.parent is not None or not root.alive:
            raise InvariantError("I8", root=root, namespace=name)
        pages = evictable = 0
        for node in tree.walk(root):
            _check_node(node, tree.page_size * TOKEN_BYTES)
            pages += len(node.pages)
            evictable += 0 if node.guard_count else len(node.pages)
            num_nodes += node.parent is not None
        if (pages, evictable) != (root.account.num_pages, root.account.num_evictable):
            raise InvariantError("I4", namespace=name, pages=pages, evictable=evictable)
        num_pages += pages
        num_evictable += evictable
    counted = {"num_pages": num_pages, "num_evictable": num_evictable, "num_nodes": num_nodes}
    kept = {"num_pages": tree.num_pages, "num_evictable": tree.num_evictable, "num_nodes": tree.num_nodes}
    if counted != kept:
        raise InvariantError("I4", counted=counted, kept=kept)


def _check_node(node: Node, page_bytes: int) -> None:
    children = node.children
    if len(node.key) != len(node.pages) * page_bytes or (not node.pages) != (node.parent is None):
        raise InvariantError("I2", node=node, key_bytes=len(node.key))
    if children is not None and not children:
        raise InvariantError("I2", node=node, reason="children is an empty dict, not None")
    for first, child in (children or {}).items():
        if first != child.key[:page_bytes] or child.parent is not node or child.start != node.end:
            raise InvariantError("I3", node=node, child=child)
        if not child.alive or child.account is not node.account:
            raise InvariantError("I8", node=node, child=child)
    if node.siblings is not None and sorted(node.siblings.keys()) != sorted(children or {}):
        raise InvariantError("I3", node=node, reason="siblings differ from children")
    guards = sum(child.guard_count > 0 for child in (children or {}).values()) + (node.lock_count > 0)
    if node.guard_count != guards or node.lock_count < 0:
        raise InvariantError("I7", node=node, guard_count=node.guard_count, counted=guards)


def _check_pages(allocator: Allocator, leases: tuple[Lease, ...], num_leased: int) -> None:
    """Every page is free, in one node, or in one lease."""
    in_tree = [page for node in allocator.tree.walk() for page in node.pages]
    in_leases = [page for lease in leases for page in lease._own]
    used = sorted(in_tree + in_leases)
    if sorted(used + allocator.pool.free_pages()) != list(range(allocator.pool.num_pages)):
        raise InvariantError("I1", reason="a page has no user or several", in_tree=len(in_tree), leased=len(in_leases))
    if len(in_leases) != num_leased:
        raise InvariantError("I4", leased=len(in_leases), kept=num_leased)
    by_account: dict[bytes, int] = {}
    for lease in leases:
        by_account[lease.namespace] = by_account.get(lease.namespace, 0) + len(lease._own)
    for key, root in allocator.tree.roots.items():
        if root.account.num_leased != by_account.pop(key, 0):
            raise InvariantError("I4", namespace=key, kept=root.account.num_leased)
    if any(by_account.values()):
        raise InvariantError("I4", reason="a lease's namespace has no root", namespaces=len(by_account))


def _check_locks(allocator: Allocator, leases: tuple[Lease, ...], pins: Pins) -> None:
    tree, policy = allocator.tree, allocator.policy
    held: dict[Node, int] = {}
    for lease in leases:
        held[lease._node] = held.get(lease._node, 0) + 1
        if not lease._node.alive or tree.climb(lease._node, lease._num_used)[1] != lease._num_used:
            raise InvariantError("I7", lease=lease.id, reason="its lock does not cover the pages it uses")
    for pin in pins.all():
        held[pin._node] = held.get(pin._node, 0) + 1
        if not pin._node.alive or pin._node.end != pin.num_pages:
            raise InvariantError("I7", pin=pin.id, reason="its lock does not end where its prefix does")
    evictable_leaves = 0
    for node in tree.walk():
        if node.lock_count != held.pop(node, 0):
            raise InvariantError("I7", node=node)
        leaf = node.parent is not None and node.children is None and node.lock_count == 0
        evictable_leaves += leaf
        if leaf != (node in policy):
            raise InvariantError("I5", node=node, evictable=leaf)
    if held or evictable_leaves != len(policy):
        raise InvariantError("I5", strays=len(held), leaves=evictable_leaves, ordered=len(policy))


def _check_levels(allocator: Allocator) -> None:
    """Every evictable leaf is ordered with its namespace's, at the level that its retention has now."""
    levels = allocator.levels
    if levels is not None:
        if levels.num_forgotten():
            raise InvariantError("I5", groups=levels.num_forgotten(), reason="a group has leaves and no turn")
        for node in allocator.tree.walk():
            if node in levels and levels.misplaced(node):
                raise InvariantError("I5", node=node, retain=node.retain, reason="in another group or level")
