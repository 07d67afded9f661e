"""What is written down of a request: one line of log, without its text and its key."""

from __future__ import annotations

import logging
import re
import secrets
from dataclasses import dataclass, field
from time import perf_counter

from starlette.requests import Request

__all__ = ["Record", "record_of", "request_id"]

log = logging.getLogger("radixkv.service")

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(slots=True)
class Record:
    """A request, while it runs.

    Attributes:
        id: the client's x-request-id where it is a plain word, or one made here.
        route: method and path.
        template: the route's own path, "other" where none fits.
        tenant: whose key it came with.
        status: of the response; 499 when the client went away, 0 before.
        prompt_tokens, cached_tokens, output_tokens: of all its answers.
        ttft_s: from its arrival to its first token.
        note: what ended it, if it failed.
    """

    id: str
    route: str
    template: str = "other"
    tenant: str = ""
    status: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float | None = None
    note: str = ""
    started: float = field(default_factory=perf_counter)

    @property
    def elapsed_s(self) -> float:
        """Since its arrival."""
        return perf_counter() - self.started

    def write(self) -> None:
        """Log it; routes that monitors ask all the time only when debugging."""
        quiet = self.status == 200 and self.route.endswith(("/health", "/ready", "/metrics"))
        parts = [f"id={self.id}", f"tenant={self.tenant or '-'}", f"route={self.route!r}", f"status={self.status}"]
        if self.prompt_tokens:
            parts.append(f"prompt={self.prompt_tokens} cached={self.cached_tokens} output={self.output_tokens}")
        if self.ttft_s is not None:
            parts.append(f"ttft={self.ttft_s * 1e3:.0f}ms")
        parts.append(f"total={self.elapsed_s * 1e3:.0f}ms")
        if self.note:
            parts.append(f"note={self.note!r}")
        log.log(logging.DEBUG if quiet else logging.INFO, "%s", " ".join(parts))


def request_id(offered: str | None) -> str:
    """A request's id: what the client calls it, if that is a plain word."""
    return offered if offered and _ID.fullmatch(offered) else f"req-{secrets.token_hex(12)}"


def record_of(request: Request) -> Record:
    """The record that the gate made for a request."""
    record = request.state.record
    assert isinstance(record, Record)
    return record
