"""Eviction order over the leaves that may be evicted.

The tree tells a policy which leaves are evictable (unlocked, no children) as they come and go; the policy says which
one loses its last pages next. Recency is an integer tick.

    tree ── add(leaf), discard(leaf) ──▶ policy ── victim() ──▶ cache trims the leaf's end
    cache ── ended(request) ───────────▶ policy ── mark ──────▶ node, for when it becomes a leaf
"""

from __future__ import annotations

from collections.abc import Callable

from radixkv.policies.classic import Fifo, Lfu, Lru, Slru
from radixkv.policies.hazard import Hazard
from radixkv.policies.levels import Levels, priority
from radixkv.policies.policy import Ended, Policy
from radixkv.policies.queues import KeyQueue, TickQueue

__all__ = ["POLICIES", "Ended", "Fifo", "Hazard", "KeyQueue", "Levels", "Lfu", "Lru", "Policy", "Slru", "TickQueue"]

POLICIES: dict[str, Callable[[int], Policy]] = {
    "auto": Hazard,
    "fifo": Fifo,
    "lfu": Lfu,
    "lru": Lru,
    "priority": priority,
    "slru": Slru,
}
"""Every eviction policy by its name; called with the pages of the cache."""
