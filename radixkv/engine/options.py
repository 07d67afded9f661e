"""What a request asks of the cache and the scheduler, besides its tokens: checked once when made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from radixkv.engine.config import is_count, is_number
from radixkv.errors import ConfigError
from radixkv.namespace import Namespace
from radixkv.retention import Retain

if TYPE_CHECKING:
    from radixkv.engine.output import Completion

__all__ = ["WILL_CONTINUE", "RequestOptions"]

WILL_CONTINUE = 1
"""Tag of a request of a session: another turn is likely. The policy `auto` learns what that is worth."""


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a request asks for, besides its prompt and its sampling.

    Attributes:
        namespace: prefixes are shared inside a namespace only.
        cache: False neither looks up nor keeps anything; None is the engine's setting.
        tenant: whom its work is charged to; tenants share the engine fairly.
        priority: higher runs first, -100 to 100; what waits long rises.
        deadline_s: seconds from now; what has not ended by then ends with `DeadlineExceeded`. None: no end.
        affinity: requests of the same text are run close together; never a border between tenants.
        retention: how much to keep which of its tokens.
        retain_at_end: asked once, when the answer is complete, for a retention in place of `retention`: what of it no later
            turn will read is known only then. On the engine's thread, so be quick.
        tag: an opaque small integer, 0 to 15, which the policy `auto` may learn from.

    Raises:
        ConfigError: a value outside these.
    """

    namespace: str | Namespace = ""
    cache: bool | None = None
    tenant: str = ""
    priority: int = 0
    deadline_s: float | None = None
    affinity: str = ""
    retention: tuple[Retain, ...] = ()
    retain_at_end: Callable[[Completion], Iterable[Retain]] | None = None
    tag: int = 0

    def __post_init__(self) -> None:
        if not (is_count(self.priority) and -100 <= self.priority <= 100):
            raise ConfigError("priority", self.priority, "a whole number, -100 to 100")
        if self.deadline_s is not None and not (is_number(self.deadline_s) and self.deadline_s > 0):
            raise ConfigError("deadline_s", self.deadline_s, "seconds, more than 0, or None")
        if not (is_count(self.tag) and 0 <= self.tag <= 15):
            raise ConfigError("tag", self.tag, "a whole number, 0 to 15")
