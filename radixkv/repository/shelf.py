"""What was packed lately, so that trees with the same files take up each other's orders."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from threading import Lock

from radixkv.repository.packing import Packing

__all__ = ["Shelf"]

_PACKINGS, _NAMESPACES = 32, 64


class Shelf:
    """The last packings of each namespace. Any thread may call anything.

    What one namespace packed is never seen from another: its order would tell what files it has.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._packings: OrderedDict[Hashable, deque[Packing]] = OrderedDict()

    def known(self, namespace: Hashable) -> tuple[Packing, ...]:
        """Its last packings, the newest last."""
        with self._lock:
            return tuple(self._packings.get(namespace, ()))

    def put(self, namespace: Hashable, packing: Packing) -> None:
        """Keep a packing; one with the same files gives way to it."""
        with self._lock:
            others = (one for one in self._packings.pop(namespace, ()) if one.files != packing.files)
            self._packings[namespace] = deque((*others, packing), maxlen=_PACKINGS)
            if len(self._packings) > _NAMESPACES:
                self._packings.popitem(last=False)
