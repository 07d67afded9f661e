"""One row of a replay's result: a policy at a capacity."""

from __future__ import annotations

from dataclasses import dataclass

from radixkv.replay.workload import Workload, token_pairs

__all__ = ["HitCount", "Row"]


@dataclass(slots=True)
class HitCount:
    """What has hit so far; mutable, made into a `Row` at the end.

    Attributes:
        page_size: tokens in a page.
        pages: pages found cached.
        pairs: `token_pairs` of the cached prefixes, summed: what attention was spared.
        requests: requests that found at least one page.
    """

    page_size: int
    pages: int = 0
    pairs: int = 0
    requests: int = 0

    def add(self, num_pages: int) -> None:
        """Count one request's cached prefix of `num_pages` pages."""
        if num_pages:
            self.pages += num_pages
            self.pairs += token_pairs(num_pages * self.page_size)
            self.requests += 1


@dataclass(frozen=True, slots=True)
class Row:
    """What one policy hit at one capacity.

    Attributes:
        policy: its name; "min" is the offline optimum.
        capacity_pages: pages of the cache.
        page_size: tokens in a page.
        requests: requests replayed.
        input_pages: whole pages of all prompts.
        hit_pages: pages of them found cached.
        input_tokens: tokens of all prompts, partial last chunks included.
        hit_tokens: hit_pages x page_size.
        input_pairs: (query, key) pairs of all prompts' prefills.
        hit_pairs: pairs that the cached prefixes spared.
        hit_requests: requests that found at least one page.
        evicted_pages: pages evicted.
        uncached_pages: pages of prompts longer than the whole cache, whose tails were not kept.
        cpu_s: CPU seconds of the replay: reading the workload and driving the cache, without check(). One thread does it
            all, so this is the time it takes on a machine that does nothing else.
    """

    policy: str
    capacity_pages: int
    page_size: int
    requests: int
    input_pages: int
    hit_pages: int
    input_tokens: int
    hit_tokens: int
    input_pairs: int
    hit_pairs: int
    hit_requests: int
    evicted_pages: int
    uncached_pages: int
    cpu_s: float

    @classmethod
    def of(
        cls, workload: Workload, policy: str, capacity_pages: int, hits: HitCount, *, evicted_pages: int, cpu_s: float
    ) -> Row:
        """Put the counts of one replay beside the workload's totals."""
        return cls(
            policy=policy,
            capacity_pages=capacity_pages,
            page_size=workload.page_size,
            requests=workload.num_requests,
            input_pages=workload.num_input_pages,
            hit_pages=hits.pages,
            input_tokens=workload.num_input_tokens,
            hit_tokens=hits.pages * workload.page_size,
            input_pairs=workload.input_pairs,
            hit_pairs=hits.pairs,
            hit_requests=hits.requests,
            evicted_pages=evicted_pages,
            uncached_pages=sum(max(length - capacity_pages, 0) for length in workload.lengths),
            cpu_s=cpu_s,
        )

    @property
    def page_hit_rate(self) -> float:
        """Hit pages / whole pages of all prompts: the study's "block hit rate"."""
        return self.hit_pages / self.input_pages if self.input_pages else 0.0

    @property
    def token_hit_rate(self) -> float:
        """Hit tokens / tokens of all prompts."""
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0

    @property
    def requests_per_s(self) -> float:
        """Requests replayed in a second of CPU time."""
        return self.requests / self.cpu_s if self.cpu_s else 0.0
