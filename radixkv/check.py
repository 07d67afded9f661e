"""check(): every invariant of docs/invariants.md that needs more than the tree, recounted."""

from __future__ import annotations

from collections.abc import Sequence

from radixkv.allocator import Allocator
from radixkv.errors import InvariantError
from radixkv.lease import Lease
from radixkv.node import Node
from radixkv.pins import Pins

__all__ = ["check_cache"]


def check_cache(allocator: Allocator, leases: Sequence[Lease], num_leased: int, pins: Pins) -> None:
    """Recount everything and compare. Cost: O(pages + nodes).

    Raises:
        InvariantError: one is broken.
    """
    allocator.pool.check()
    allocator.tree.check()
    _check_pages(allocator, leases, num_leased)
    if pins.num_pages != pins.count():
        raise InvariantError("I4", pinned=pins.count(), kept=pins.num_pages)
    _check_locks(allocator, leases, pins)
    _check_levels(allocator)


def _check_pages(allocator: Allocator, leases: Sequence[Lease], num_leased: int) -> None:
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


def _check_locks(allocator: Allocator, leases: Sequence[Lease], pins: Pins) -> None:
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
