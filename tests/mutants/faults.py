"""Faults planted into the real classes, one at a time, to see whether the tests notice.

A fault is a few edits of the text of a method: the edited method replaces the real one inside `planted(name)`. Text that
is no longer there fails loudly, so a fault cannot rot into changing nothing.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from radixkv.allocator import Allocator
from radixkv.cache import PrefixCache
from radixkv.lease import Lease
from radixkv.leasing import Leasing
from radixkv.pages import PagePool
from radixkv.pins import Pins
from radixkv.policies import Levels, TickQueue
from radixkv.policies.levels import _Group
from radixkv.quota import Quotas
from radixkv.retention import Retain, Retention
from radixkv.siblings import Siblings
from radixkv.tree import RadixTree

WORLDS = 60
"""Worlds that a walk goes through to judge a fault: 5,000 steps, 2 seconds."""

LIMIT_WORLDS = 40
"""As `WORLDS`, of the walk through retention, pins and quotas."""


class Edit(NamedTuple):
    """In `owner.method`, `old`, which stands there once, becomes `new`."""

    owner: type
    method: str
    old: str
    new: str


_TRIM_CHECKS_NOTHING = Edit(RadixTree, "trim", "assert leaf.children is None and leaf.lock_count == 0 and", "assert")

FAULTS: dict[str, tuple[Edit, ...]] = {
    "attach forgets the pages it gives up": (Edit(Leasing, "attach", "self._give_up(lease, num_freed)", "pass"),),
    "attach keeps the old lock": (
        Edit(Leasing, "attach", "self._stand_on(lease, found.partial_page, found.partial_node)", "lease._partial_page = -1"),
    ),
    "attach forgets the limit": (Edit(Leasing, "attach", "if limit >= 0 and", "if False and"),),
    "attach keeps the gathered path": (Edit(Leasing, "attach", "lease._path = None", "pass"),),
    "split forgets the lock": (
        Edit(RadixTree, "_split", "node.key = node.key[cut:]", "node.lock_count = 0; node.key = node.key[cut:]"),
    ),
    "split forgets the guard above": (
        Edit(RadixTree, "_split", "upper.guard_count = 1 if node.guard_count else 0", "upper.guard_count = 0"),
    ),
    "split hands the lock to the upper half": (
        Edit(
            RadixTree,
            "_split",
            "node.key = node.key[cut:]",
            "upper.lock_count, node.lock_count = node.lock_count, 0; node.guard_count = 0; node.key = node.key[cut:]",
        ),
    ),
    "duplicate pages leak": (Edit(Leasing, "_hand_over", "self._allocator.pool.free(fresh[: done.num_duplicate])", "pass"),),
    "duplicates are not renamed": (Edit(Leasing, "_hand_over", "lease._path = None", "pass"),),
    "an inner node is evicted": (
        Edit(RadixTree, "unlock", "if node.children is None:", "if True:"),
        _TRIM_CHECKS_NOTHING,
    ),
    "a leaf that got a child stays in the order": (
        Edit(RadixTree, "_attach", "self.order.discard(parent)", "pass"),
        _TRIM_CHECKS_NOTHING,
    ),
    "a leased page is evicted": (
        Edit(RadixTree, "lock", "self.order.discard(node)", "pass"),
        _TRIM_CHECKS_NOTHING,
    ),
    "the page to copy from is not locked": (
        Edit(Leasing, "_open", "self._tree.lock(node)", "self._tree.lock(found.node)"),
        Edit(Lease, "__init__", "self._node = found.partial_node", "self._node = found.node"),
    ),
    "narrowing forgets the page to copy from": (
        Edit(Lease, "_num_used", "self._published + (self._partial_page >= 0)", "self._published"),
    ),
    "a child is keyed by one token": (
        Edit(RadixTree, "match", "tail[offset : offset + page_bytes]", "tail[offset : offset + 4]"),
        Edit(RadixTree, "_split", "first = bytes(node.key[: self._page_bytes])", "first = bytes(node.key[:4])"),
        Edit(RadixTree, "_split", "{bytes(node.key[: self._page_bytes]): node}", "{bytes(node.key[:4]): node}"),
        Edit(RadixTree, "_attach", "first = key[: self._page_bytes]", "first = key[:4]"),
        Edit(RadixTree, "_detach", "first = bytes(leaf.key[: self._page_bytes])", "first = bytes(leaf.key[:4])"),
    ),
    "a leaf grows under another's lock": (Edit(RadixTree, "_may_grow", "leaf.lock_count == own_locks", "True"),),
    "a trimmed leaf grows again": (Edit(RadixTree, "_may_grow", "and not leaf.trimmed", ""),),
    "a parent does not learn of its children's uses": (
        Edit(RadixTree, "_detach", "if leaf.tick > parent.tick:", "if False:"),
    ),
    "unlock forgets to count pages evictable": (Edit(RadixTree, "unlock", "self.num_evictable += num_pages", "pass"),),
    "unlock forgets to put the leaf back in order": (Edit(RadixTree, "unlock", "self._leaf_free(node)", "pass"),),
    "the salt is ignored": (
        Edit(
            PrefixCache, "namespace_key", "namespace_key(namespace, self.fingerprint)", "namespace_key('', self.fingerprint)"
        ),
    ),
    "the fingerprint is ignored": (Edit(PrefixCache, "namespace_key", "return namespace.key", "return Namespace('').key"),),
    "a cursor trusts a node that left": (Edit(RadixTree, "climb", "position = min(position, node.start)", "pass"),),
    "a cursor trusts a position that was trimmed": (
        Edit(RadixTree, "climb", "position = min(position, node.start + len(node.pages))", "pass"),
    ),
    "a truncated cursor keeps its place": (
        Edit(
            Leasing,
            "open_cursor",
            "self._tree.climb(cursor._node, cursor._position)",
            "self._tree.climb(cursor._node, cursor._node.end)",
        ),
    ),
    "pages are evicted before it is sure that they suffice": (
        Edit(Leasing, "_allocate", "self._allocator.require(", "self._allocator.evict(missing); self._allocator.require("),
    ),
    "a match inside an edge locks all of it": (Edit(Leasing, "narrow", "self._wide.values()", "()"),),
    "a release touches pages it did not use": (
        Edit(Leasing, "_settle", "node = self._tree.settle(node, position, self._tick, time_s)", "node.tick = self._tick"),
    ),
    "a release keeps its unpublished pages": (Edit(Leasing, "release", "self._allocator.pool.free(own)", "pass"),),
    "a late leaf counts as the newest": (Edit(TickQueue, "add", "tick >= self._newest", "True"),),
    "the oldest of the late leaves is forgotten": (
        Edit(TickQueue, "first", "return leaf if late is None or late.tick > leaf.tick else late", "return leaf"),
    ),
    "eviction takes the head of an edge": (
        Edit(RadixTree, "trim", "pages = leaf.pages[keep:]", "pages = leaf.pages[:num_pages]"),
        Edit(RadixTree, "trim", "del leaf.pages[keep:]", "del leaf.pages[:num_pages]"),
    ),
    "the neighbour search looks one way": (Edit(Siblings, "closest", "max(index - 1, 0)", "index"),),
    "the limit is ignored": (Edit(Leasing, "_open", "found = found.cut(limit, self.page_size)", "pass"),),
    "remove takes what leases hold": (
        Edit(RadixTree, "remove", "if member.guard_count:", "if False:"),
        _TRIM_CHECKS_NOTHING,
    ),
    "remove ignores the tokens after the last whole page": (Edit(RadixTree, "remove", "if first.startswith(probe)", ""),),
    "a freed page keeps its generation": (Edit(PagePool, "_count", "generation[page] += 1", "pass"),),
    "a root is never forgotten": (Edit(RadixTree, "_leaf_free", "del self.roots[node.account.key]", "pass"),),
}

LIMIT_FAULTS: dict[str, tuple[Edit, ...]] = {
    "a level never falls": (Edit(Levels, "_fall", "self._due_s[leaf] <= now_s", "False"),),
    "a leaf that left still falls": (Edit(Levels, "discard", "self._due.discard(leaf)", "pass"),),
    "a use does not begin the time anew": (Edit(RadixTree, "settle", "node.time_s = time_s", "pass"),),
    "a parent does not learn when its children were used": (
        Edit(RadixTree, "_detach", "parent.time_s, parent.mark = leaf.tick, leaf.time_s,", "_, parent.mark = leaf.tick, 0,"),
    ),
    "a linear wish falls at once": (Edit(Retain, "standing", 'if self.decay == "linear" else 1', "* 0 + 1"),),
    "a low wish falls further": (
        Edit(Retain, "standing", "fallen = done if distance > 0 else -done", "fallen = done if self.priority > done else 0"),
    ),
    "levels stand in order of arrival": (
        Edit(_Group, "at", "self._open.insert(index, level)", "level in self._open or self._open.append(level)"),
    ),
    "an empty level hides the others": (Edit(_Group, "level", "if len(part):", "if True:"),),
    "a group's new leaf is not compared": (Edit(Levels, "add", "self._changed[group] = None", "pass"),),
    "a group's lost leaf is still compared": (Edit(Levels, "discard", "self._changed[self._group(leaf)] = None", "pass"),),
    "a group that gave nothing is forgotten": (Edit(Levels, "victim_for", "heappush(self._heads, head)", "pass"),),
    "reserved pages are named as victims": (
        Edit(Levels, "victim_for", "leaf.account.num_pages > head.group.reserved_pages", "True"),
        Edit(Quotas, "spare", "account is asker", "True"),
    ),
    "a victim loses reserved pages too": (Edit(Quotas, "spare", "account is asker", "True"),),
    "a dropped group keeps its leaves": (Edit(Levels, "_move", "self.discard(leaf)", "pass"),),
    "a split forgets the wish": (Edit(RadixTree, "_split", "upper.retain = node.retain", "pass"),),
    "a retained leaf grows": (Edit(RadixTree, "_may_grow", "and leaf.retain is None", ""),),
    "the weaker wish holds": (Edit(Retain, "stronger", "return self.priority > (", "return self.priority < ("),),
    "the shorter of two equal wishes holds": (
        Edit(Retain, "stronger", "longer._lasts() > shorter._lasts()", "longer._lasts() < shorter._lasts()"),
    ),
    "a wish reaches beyond its range": (Edit(Retention, "apply", "if wish.stop is None else", "if True else"),),
    "a wish begins a page early": (Edit(Retention, "apply", "-(-wish.start // size)", "wish.start // size"),),
    "a request lowers what it only found": (Edit(Retention, "apply", "low >= num_others)", "True)"),),
    "a wish marks whole nodes": (Edit(Retention, "apply", "below = _cut_out(tree, below, low, last)", "pass"),),
    "a switch of policy forgets the quotas' groups": (
        Edit(Allocator, "set_policy", "levels.set_group(key, quota.reserved_pages, ())", "pass"),
    ),
    "a switch of policy forgets the reservations": (
        Edit(Allocator, "set_policy", "levels.set_group(key, quota.reserved_pages, ())", "levels.set_group(key, 0, ())"),
    ),
    "pages of leases do not count in a quota": (Edit(Quotas, "claim", "+ account.num_leased", ""),),
    "a quota is a page too large": (Edit(Quotas, "claim", "+ num_pages - most", "+ num_pages - most - 1"),),
    "reservations may be more than there is": (
        Edit(Quotas, "set", "self._num_pages - 1 - self._num_pinnable - others", "self._num_pages - 1"),
    ),
    "a refusal counts what wide locks hold": (
        Edit(Leasing, "_allocate_within", "by_namespace(cover(self._ends()))", "None"),
    ),
    "a refusal counts what others have reserved": (Edit(Quotas, "room", "if quota.reserved_pages and", "if False and"),),
    "pages go before it is sure that they suffice": (
        Edit(
            Leasing,
            "_allocate_within",
            "if claim.over or claim.missing:",
            "if self._allocator.evict_of(claim.over, account) or claim.over or claim.missing:",
        ),
    ),
    "lowering a quota forgets wide locks": (Edit(PrefixCache, "set_quota", "self._leasing.narrow()", "pass"),),
    "a pin pays for what others have pinned": (Edit(Pins, "cost", "_added(self.ends(), end)", "end.position"),),
    "a pin may take more than is left": (Edit(Pins, "require", 'cost.refusal == "budget"', "False"),),
    "owners have one budget together": (Edit(Pins, "ends", "pin.owner == owner", "True"),),
    "a pin locks all of the edge it ends in": (
        Edit(Leasing, "pin", "self._tree.end_at(end.node, end.position)", "end.node"),
    ),
    "a released pin stays locked": (Edit(Leasing, "unpin", "self._tree.unlock(pin._node)", "pass"),),
    "pinned pages count as evictable": (Edit(Leasing, "_ends", "ends.extend(self.pins.ends())", "pass"),),
}
"""What needs retention, pins or quotas to be seen: tests/core/limits.py walks there."""

THREAD_FAULTS: dict[str, tuple[Edit, ...]] = {
    "the lock is missing": (Edit(PrefixCache, "__init__", "RLock()", "__import__('contextlib').nullcontext()"),),
}
"""What one thread alone can never notice."""


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Run with the fault in place; the real methods are back afterwards, whatever happened."""
    texts: dict[tuple[type, str], str] = {}
    for edit in (FAULTS | LIMIT_FAULTS | THREAD_FAULTS)[name]:
        place = edit.owner, edit.method
        text = texts.get(place) or textwrap.dedent(inspect.getsource(_function(*place)))
        if text.count(edit.old) != 1:
            raise LookupError(f"{edit.owner.__name__}.{edit.method} has {text.count(edit.old)} times {edit.old!r}")
        texts[place] = text.replace(edit.old, edit.new)
    kept = {place: inspect.getattr_static(*place) for place in texts}
    try:
        for (owner, method), text in texts.items():
            code = compile(text, f"<{name}>", "exec")
            made: dict[str, object] = {}
            exec(code, _function(owner, method).__globals__, made)
            setattr(owner, method, made[method])
        yield
    finally:
        for (owner, method), real in kept.items():
            setattr(owner, method, real)


def _function(owner: type, method: str):
    found = inspect.getattr_static(owner, method)
    return found.fget if isinstance(found, property) else found
