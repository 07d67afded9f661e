"""Metrics through a real process, read with Prometheus' own parser."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.model

NAMES = {
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:generation_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_success_total",
    "sglang:cache_hit_rate",
    "sglang:cached_tokens_total",
    "sglang:prompt_tokens_total",
    "sglang:evicted_tokens_total",
    "sglang:token_usage",
    "radixkv:tenant_prompt_tokens_total",
}


def scrape(http):
    """Every sample's value, summed over its labels."""
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0) + sample.value
    return values


def test_a_request_moves_the_counters_by_its_usage(http):
    body = {"prompt": "count me " * 30, "max_tokens": 3, "temperature": 0, "cache_salt": "metrics", "ignore_eos": True}
    http.post("/v1/completions", json=body)
    before = scrape(http)
    usage = http.post("/v1/completions", json=body).json()["usage"]
    after = scrape(http)
    moved = {name: after[name] - before.get(name, 0) for name in after}
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    for name in ("vllm:prompt_tokens_total", "sglang:prompt_tokens_total", "radixkv:tenant_prompt_tokens_total"):
        assert moved[name] == usage["prompt_tokens"]
    for name in ("vllm:prompt_tokens_cached_total", "sglang:cached_tokens_total", "vllm:prefix_cache_hits_total"):
        assert moved[name] == cached
    assert moved["radixkv:computed_tokens_total"] == usage["prompt_tokens"] - cached
    assert moved["vllm:generation_tokens_total"] == moved["radixkv:tenant_output_tokens_total"] == 3
    assert moved["vllm:time_to_first_token_seconds_count"] == moved["vllm:e2e_request_latency_seconds_count"] == 1
    assert moved["vllm:inter_token_latency_seconds_count"] == 2
    assert 0 < after["sglang:cache_hit_rate"] <= 1


def test_the_names_that_dashboards_read_are_there(http):
    assert set(scrape(http)) >= NAMES


def test_strangers_paths_are_no_labels(http):
    for number in range(3):
        http.get(f"/stranger-{number}")
    assert "stranger" not in http.get("/metrics").text
