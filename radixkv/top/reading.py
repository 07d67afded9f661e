"""What one reading of /metrics says, and what happened between two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from radixkv_client import Histogram, Metrics

__all__ = ["Counters", "Interval", "Pool", "Reading", "between", "read"]


@dataclass(frozen=True, slots=True)
class Pool:
    """Pages of the pool, by what can be done with them: held + cached + free = all.

    Attributes:
        held: pages that running requests or pins hold.
        cached: pages that can be evicted.
        free: pages that hold nothing.
    """

    held: int
    cached: int
    free: int

    @property
    def num_pages(self) -> int:
        """All of them."""
        return self.held + self.cached + self.free


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals since the server began.

    Attributes:
        requests: answers that ended.
        prompt_tokens: of those.
        cached_tokens: of the prompts, taken from the cache.
        generated_tokens: of all answers, as they come: first tokens and those between tokens.
        preemptions: requests put back in the queue.
        evicted_tokens: tokens whose pages were evicted.
    """

    requests: float
    prompt_tokens: float
    cached_tokens: float
    generated_tokens: float
    preemptions: float
    evicted_tokens: float

    def since(self, before: Counters) -> Counters:
        """What was counted since; all of it where a count fell, because the server began anew."""
        names = self.__slots__
        if any(getattr(self, name) < getattr(before, name) for name in names):
            return self
        return Counters(*(getattr(self, name) - getattr(before, name) for name in names))

    @property
    def hit_rate(self) -> float | None:
        """Cached / prompt tokens; None where there was no prompt."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None


@dataclass(frozen=True, slots=True)
class Reading:
    """One reading.

    Attributes:
        at_s: when, on a clock that never goes back.
        model: its name.
        running, waiting: requests now.
        counters: totals.
        pool: pages now.
        first: times to first tokens, seconds.
        next: times between tokens, seconds.
    """

    at_s: float
    model: str
    running: int
    waiting: int
    counters: Counters
    pool: Pool
    first: Histogram
    next: Histogram


@dataclass(frozen=True, slots=True)
class Interval:
    """What happened between two readings.

    Attributes:
        seconds: between them.
        counted: in that time.
        first, next: observations of that time.
    """

    seconds: float
    counted: Counters
    first: Histogram
    next: Histogram


def read(metrics: Metrics, at_s: float) -> Reading | None:
    """A reading out of the metrics; None while the server has no engine yet: the model is being loaded."""
    if "radixkv:pages" not in metrics:
        return None
    first = metrics.histogram("vllm:time_to_first_token_seconds")
    following = metrics.histogram("vllm:inter_token_latency_seconds")
    total, free, cached = (
        int(metrics.total(name)) for name in ("radixkv:pages", "radixkv:pages_free", "radixkv:pages_evictable")
    )
    return Reading(
        at_s=at_s,
        model=metrics.samples("radixkv:pages")[0].labels.get("model_name", ""),
        running=int(metrics.total("vllm:num_requests_running")),
        waiting=int(metrics.total("vllm:num_requests_waiting")),
        counters=Counters(
            requests=metrics.total("radixkv:requests_total"),
            prompt_tokens=metrics.total("vllm:prompt_tokens_total"),
            cached_tokens=metrics.total("vllm:prompt_tokens_cached_total"),
            generated_tokens=first.count + following.count,
            preemptions=metrics.total("vllm:num_preemptions_total"),
            evicted_tokens=metrics.total("sglang:evicted_tokens_total"),
        ),
        pool=Pool(held=max(total - free - cached, 0), cached=cached, free=free),
        first=first,
        next=following,
    )


def between(before: Reading, after: Reading) -> Interval:
    """What happened from one reading to the next."""
    return Interval(
        seconds=after.at_s - before.at_s,
        counted=after.counters.since(before.counters),
        first=after.first.since(before.first),
        next=after.next.since(before.next),
    )
