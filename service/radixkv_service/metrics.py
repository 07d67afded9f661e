"""Counts for Prometheus, under the names that dashboards of vLLM and SGLang already read, and radixkv:* for the rest.

    requests, as they end ──▶ counters and histograms ┐
    engine's totals, at the scrape ──▶ EngineCollector ┴──▶ one registry of its own ──▶ /metrics

Hit rates are counters of tokens, hits over queries: a gauge alone cannot be summed over servers. A tenant's, and the gauge,
count a prompt once a request; the engine's totals count it for each of its `n` answers, as vLLM's do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from radixkv_service.record import Record

if TYPE_CHECKING:
    from radixkv.engine import EngineStats
    from radixkv.engine.output import Completion

__all__ = ["EngineCollector", "Metrics"]

_WINDOW_S = 15.0  # of sglang:cache_hit_rate, as SGLang has it

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_TOTAL_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """Everything that is counted.

    Args:
        model: the label `model_name`.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.engine = EngineCollector(model)
        self.registry.register(self.engine)
        self._model = model
        labels = ("model_name",)
        self._http = Counter("radixkv:http_requests", "Answered HTTP requests.", ("route", "status"), registry=self.registry)
        self._tenant_prompt = Counter(
            "radixkv:tenant_prompt_tokens", "Prompt tokens of a tenant, once a request.", ("tenant",), registry=self.registry
        )
        self._tenant_cached = Counter(
            "radixkv:tenant_cached_tokens", "Of those, taken from the cache.", ("tenant",), registry=self.registry
        )
        self._tenant_output = Counter(
            "radixkv:tenant_output_tokens", "Generated tokens of a tenant.", ("tenant",), registry=self.registry
        )
        self._success = Counter(
            "vllm:request_success", "Finished answers.", (*labels, "finished_reason"), registry=self.registry
        )
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "From a request to its first token.", _TTFT_S)
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Between two tokens of an answer.", _TOKEN_S)
        self._total = self._histogram("vllm:e2e_request_latency_seconds", "From a request to its last token.", _TOTAL_S)
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._output = self._histogram("vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._computed = self._histogram(
            "vllm:request_prefill_kv_computed_tokens", "Tokens of a prompt that were computed.", _TOKENS
        )
        self._rate = Gauge(
            "sglang:cache_hit_rate", "Cached / prompt tokens of the last 15 s.", labels, registry=self.registry
        )
        self._recent: deque[tuple[float, int, int]] = deque()

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        family = Histogram(name, text, ("model_name",), buckets=tuple(buckets), registry=self.registry)
        return family.labels(self._model)

    def finished(self, completion: Completion, tenant: str) -> None:
        """Count an answer."""
        self._success.labels(self._model, completion.finish_reason).inc()
        self._prompt.observe(completion.prompt_tokens)
        self._computed.observe(completion.computed_tokens)
        self._output.observe(len(completion.token_ids))
        self._total.observe(completion.total_s)
        if completion.token_ids:
            self._ttft.observe(completion.ttft_s)
        self._tenant_output.labels(tenant).inc(len(completion.token_ids))

    def asked(self, prompt_tokens: int, cached_tokens: int, tenant: str) -> None:
        """Count a prompt of a request, once for all its answers.

        Args:
            prompt_tokens: how long it is.
            cached_tokens: of those, what was cached before the request came.
            tenant: whose request it is.
        """
        self._tenant_prompt.labels(tenant).inc(prompt_tokens)
        self._tenant_cached.labels(tenant).inc(cached_tokens)
        self._recent.append((monotonic(), prompt_tokens, cached_tokens))
        self._forget()

    def token_after(self, seconds: float) -> None:
        """Count a token that came so long after the one before it."""
        self._between.observe(seconds)

    def answered(self, record: Record) -> None:
        """Count an HTTP response; paths that are no route, and refused requests, are one."""
        self._http.labels(record.template, str(record.status)).inc()

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        self._forget()
        prompt = sum(one[1] for one in self._recent)
        self._rate.labels(self._model).set(sum(one[2] for one in self._recent) / prompt if prompt else 0.0)
        return generate_latest(self.registry)

    def _forget(self) -> None:
        oldest = monotonic() - _WINDOW_S
        while self._recent and self._recent[0][0] < oldest:
            self._recent.popleft()


class EngineCollector(Collector):
    """The engine's own totals, as they were when last asked for.

    Args:
        model: the label `model_name`.

    Attributes:
        stats: what the engine said last; None before it is loaded.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self.stats: EngineStats | None = None

    def collect(self) -> Iterator[Metric]:
        """Every family, from one snapshot."""
        stats = self.stats
        if stats is None:
            return
        cache = stats.cache
        size = cache.page_size
        used = cache.num_pages - cache.num_free - cache.num_evictable
        yield self._counter(
            "vllm:prefix_cache_queries", "Tokens looked up in the cache, for each answer.", cache.lookup_tokens
        )
        yield self._counter("vllm:prefix_cache_hits", "Of those, found.", cache.hit_tokens)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens, of each answer.", stats.prompt_tokens)
        yield self._counter("vllm:prompt_tokens_cached", "Of those, taken from the cache.", stats.cached_tokens)
        yield self._counter("vllm:generation_tokens", "Generated tokens.", stats.generated_tokens)
        yield self._counter("vllm:num_preemptions", "Requests put back in the queue.", stats.preemptions)
        yield self._gauge("vllm:num_requests_running", "Requests that run.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait.", stats.waiting)
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "Pages that are not free for the taking, 0 to 1.", used / cache.num_pages
        )
        yield self._counter("sglang:prompt_tokens", "Prompt tokens, of each answer.", stats.prompt_tokens)
        yield self._counter("sglang:generation_tokens", "Generated tokens.", stats.generated_tokens)
        yield self._counter("sglang:evicted_tokens", "Tokens whose pages were evicted.", cache.evicted_pages * size)
        yield self._gauge("sglang:token_usage", "Pages that hold something, 0 to 1.", 1 - cache.num_free / cache.num_pages)
        yield self._gauge("sglang:kv_available_tokens", "Tokens that free pages hold.", cache.num_free * size)
        yield self._gauge("sglang:kv_evictable_tokens", "Tokens in pages that can be evicted.", cache.num_evictable * size)
        yield self._gauge("sglang:kv_used_tokens", "Tokens in pages that cannot.", used * size)
        by_source = CounterMetricFamily(
            "sglang:cached_tokens", "Prompt tokens taken from the cache.", labels=("model_name", "cache_source")
        )
        by_source.add_metric((self._model, "device"), stats.cached_tokens)
        yield by_source
        yield self._counter("radixkv:computed_tokens", "Prompt tokens that went through the model.", stats.computed_tokens)
        yield self._counter("radixkv:recomputed_tokens", "Of preempted requests, again.", stats.recomputed_tokens)
        yield self._counter("radixkv:requests", "Requests that ended.", stats.requests)
        yield self._counter("radixkv:prefill_seconds", "Time spent on prompts.", stats.prefill_s)
        yield self._counter("radixkv:lookups", "Look-ups in the cache.", cache.lookups)
        yield self._gauge("radixkv:pages", "Pages of the pool.", cache.num_pages)
        yield self._gauge("radixkv:pages_free", "Free pages.", cache.num_free)
        yield self._gauge("radixkv:pages_evictable", "Cached pages that can be evicted.", cache.num_evictable)
        yield self._gauge("radixkv:pages_locked", "Cached pages that leases or pins hold.", cache.num_locked)
        yield self._gauge("radixkv:pages_leased", "Pages that are being filled.", cache.num_leased)
        yield self._gauge("radixkv:pages_pinned", "Pinned pages.", cache.num_pinned)
        yield self._gauge("radixkv:nodes", "Nodes of the tree.", cache.num_nodes)
        yield self._gauge("radixkv:namespaces", "Namespaces with something cached.", cache.num_namespaces)

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family
