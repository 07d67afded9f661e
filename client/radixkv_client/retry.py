"""When to ask again: a server that is loading or full says so before it has begun anything, and says for how long."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["NO_RETRY", "Retry", "retry_after_s"]

_RETRIED = (429, 503)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and for how long to ask again after 429 or 503.

    Attributes:
        max_retries: requests after the first.
        max_wait_s: longest single wait; a server that asks for more is not waited for.
        first_wait_s: where the server does not say how long: this, then twice as long each time.
    """

    max_retries: int = 3
    max_wait_s: float = 20.0
    first_wait_s: float = 0.5

    def wait_s(self, num_tries: int, status: int, asked_s: float | None) -> float | None:
        """How long to wait after so many tries and this answer; None: not again.

        >>> Retry().wait_s(1, 503, 2.0), Retry().wait_s(4, 503, 2.0), Retry().wait_s(1, 500, None)
        (2.0, None, None)
        """
        if status not in _RETRIED or num_tries > self.max_retries:
            return None
        wait = asked_s if asked_s is not None else self.first_wait_s * 2 ** (num_tries - 1)
        return wait if wait <= self.max_wait_s else None


NO_RETRY = Retry(max_retries=0)
"""Ask once."""


def retry_after_s(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None where it holds neither.

    >>> retry_after_s("1.5"), retry_after_s("soon"), retry_after_s("-3")
    (1.5, None, None)
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            at = parsedate_to_datetime(header)
        except ValueError:
            return None
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        return max((at - (now or datetime.now(UTC))).total_seconds(), 0.0)
    return seconds if 0 <= seconds < float("inf") else None
