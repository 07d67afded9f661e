"""What `radixkv top` makes of two readings, and that it says so in words."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from radixkv.top.reading import between, read
from radixkv.top.screen import draw
from radixkv_client import parse_metrics


def metrics(prompt=0, cached=0, first=0, gaps=(0, 0, 0), pages=(100, 40, 50), evicted=0):
    m = 'model_name="m"'
    times = "vllm:time_to_first_token_seconds_bucket"
    nexts = "vllm:inter_token_latency_seconds_bucket"
    return parse_metrics(
        f"radixkv:pages{{{m}}} {pages[0]}\nradixkv:pages_free{{{m}}} {pages[1]}\nradixkv:pages_evictable{{{m}}} {pages[2]}\n"
        f"vllm:num_requests_running{{{m}}} 3\nvllm:num_requests_waiting{{{m}}} 2\nradixkv:requests_total{{{m}}} {first}\n"
        f"vllm:prompt_tokens_total{{{m}}} {prompt}\nvllm:prompt_tokens_cached_total{{{m}}} {cached}\n"
        f"vllm:num_preemptions_total{{{m}}} 1\nsglang:evicted_tokens_total{{{m}}} {evicted}\n"
        f'{times}{{{m},le="0.1"}} {first}\n{times}{{{m},le="+Inf"}} {first}\n'
        f'{nexts}{{{m},le="0.01"}} {gaps[0]}\n{nexts}{{{m},le="0.02"}} {gaps[1]}\n{nexts}{{{m},le="+Inf"}} {gaps[2]}\n'
    )


def shown(*arguments, **more):
    text = io.StringIO()
    Console(file=text, width=120).print(draw("http://x", *arguments, **more))
    return " ".join(text.getvalue().split())


def test_rates_are_what_was_counted_between_two_readings_over_their_time():
    before = read(metrics(prompt=1000, cached=500, first=10, gaps=(5, 5, 5)), 100.0)
    after = read(metrics(prompt=1400, cached=800, first=14, gaps=(5, 25, 25), evicted=64), 102.0)
    interval = between(before, after)
    assert (interval.seconds, interval.counted.prompt_tokens, interval.counted.generated_tokens) == (2.0, 400, 24)
    assert interval.counted.hit_rate == 0.75
    assert interval.next.quantile(0.5) == pytest.approx(0.015)
    text = shown(after, interval, [0.0, None, 0.75])
    assert "3 running 2 waiting 2.0/s ended" in text
    assert "prompt 200.0/s generated 12.0/s" in text
    assert "now 75.0 % in all 57.1 %" in text
    assert "held 10.0 %, cached 50.0 % of 100 pages" in text
    assert "next token p50 15 ms" in text
    assert "evicted 64 tokens (+64)" in text
    assert "▁ ▇" in text


def test_after_a_restart_of_the_server_counts_begin_at_nothing():
    before = read(metrics(prompt=1000, cached=500, first=10, gaps=(5, 5, 5)), 100.0)
    after = read(metrics(prompt=100, cached=20, first=1, gaps=(0, 4, 4)), 101.0)
    interval = between(before, after)
    assert (interval.counted.prompt_tokens, interval.counted.generated_tokens, interval.first.count) == (100, 5, 1)


def test_what_is_not_known_is_a_dash():
    reading = read(metrics(), 0.0)
    text = shown(reading, None)
    assert "now - in all -" in text
    assert "prompt - generated -" in text
    assert "first token p50 - p99 -" in text
    assert "p50 - p99 -" in shown(reading, between(reading, reading))


def test_without_an_engine_there_is_no_reading():
    assert read(parse_metrics('radixkv:http_requests_total{route="/health"} 3\n'), 0.0) is None


def test_trouble_stands_above_what_was_read_last():
    text = shown(read(metrics(), 0.0), None, trouble="no answer from http://x")
    assert text.index("no answer from http://x") < text.index("3 running")
    assert "no answer" in shown(None, None, trouble="no answer")
