from __future__ import annotations

from dataclasses import replace

import pytest

from radixkv.errors import ConfigError
from radixkv.replay.capacity import capacity_pages, split_list
from radixkv.replay.cost import GPUS, SHAPES, ModelShape, named_gpu, named_shape, saving
from radixkv.replay.curve import lru_curve
from radixkv.replay.reuse import Reuse
from radixkv.replay.rows import HitCount, Row
from radixkv.replay.workload import Workload
from tests.replay.traces import DATA, requests_of


@pytest.mark.parametrize(
    ("text", "pages"),
    [
        ("3014p", 3014),
        ("2kp", 2000),
        ("1.5kp", 1500),
        ("2Mt", 15625),
        ("2000000t", 15625),
        ("2000127t", 15625),
        ("128t", 1),
        ("0.5Gt", 3906250),
        ("40GB", 2384),
        ("40GiB", 2560),
        ("512MiB", 32),
        ("16777216B", 1),
        ("5%", 50),
        ("0.1%", 1),
        ("0.01%", 1),
        (" 12.34 % ", 123),
        ("250%", 2500),
    ],
)
def test_capacities_as_people_write_them(text, pages):
    assert capacity_pages(text, page_size=128, footprint_pages=1000, bytes_per_token=131072) == pages


@pytest.mark.parametrize(
    "text",
    ["", "5", "p", "-5p", "5 pages", "1e9p", "0p", "0%", "0.0%", "127t", "1B", "9Tp", "5kb", "5Kip%", "\u0665p", "5k%"],
)
def test_other_texts_are_no_capacities(text):
    with pytest.raises(ConfigError, match="capacity"):
        capacity_pages(text, page_size=128, footprint_pages=1000, bytes_per_token=131072)


def test_lists_are_commas_or_repeats():
    assert split_list(["a,b", "c", ",a,"]) == ["a", "b", "c"]


def test_flops_by_hand():
    """2 layers, width 8, 4 query and 2 KV heads of 2, MLP 16: weights are q 64, k and v 32 each, o 64, MLP 384 a layer."""
    shape = ModelShape(num_layers=2, width=8, num_heads=4, num_kv_heads=2, head_dim=2, mlp_width=16)
    assert shape.linear_flops == 2 * 2 * (64 + 32 + 32 + 64 + 384)
    assert shape.attention_flops == 2 * 2 * 2 * 4 * 2  # layers x (scores, values) x (multiply, add) x heads x size
    assert shape.kv_bytes_per_token == 2 * 2 * 2 * 2 * 2
    assert shape.prefill_flops(3, 1 + 2 + 3) == 3 * 2304 + 6 * 64


def test_a_saving_by_hand():
    shape = ModelShape(num_layers=1, width=1, num_heads=1, num_kv_heads=1, head_dim=1, mlp_width=0)
    with Workload.of(requests_of([[0, 1], [0, 2]])) as workload:  # 8 and 9 tokens in pages of 4; one page hits
        hits = HitCount(4)
        hits.add(0)
        hits.add(1)
        row = Row.of(workload, "lru", 9, hits, evicted_pages=0, cpu_s=1.0)
    saved = saving(row, shape, replace(GPUS["h100"], peak_tflops=1e-9), utilisation=0.25)
    assert (row.hit_tokens, row.hit_pairs, row.hit_requests) == (4, 10, 1)
    assert saved.flops == 4 * 8 + 10 * 4
    assert saved.share == saved.flops / (17 * 8 + (36 + 45) * 4)
    assert saved.gpu_seconds == pytest.approx(saved.flops / 250)
    assert saved.gpu_hours == saved.gpu_seconds / 3600
    with pytest.raises(ConfigError, match="utilisation"):
        saving(row, shape, GPUS["h100"], utilisation=1.5)


# what the hub says each model has: vocabulary, embedding matrices (1: tied), parameters in billions
PARAMETERS = {
    "llama-3.1-8b": (128256, 2, 8.030),
    "llama-3.1-70b": (128256, 2, 70.55),
    "llama-3.2-1b": (128256, 1, 1.236),
    "llama-3.2-3b": (128256, 1, 3.213),
    "mistral-7b": (32768, 2, 7.248),
    "qwen3-0.6b": (151936, 1, 0.596),
    "qwen3-4b": (151936, 1, 4.022),
    "qwen3-8b": (151936, 2, 8.191),
    "qwen3-14b": (151936, 2, 14.77),
    "qwen3-32b": (151936, 2, 32.76),
    "smollm2-135m": (49152, 1, 0.1345),
    "smollm2-1.7b": (49152, 1, 1.711),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_its_models_parameters(name):
    vocabulary, matrices, billions = PARAMETERS[name]
    shape = named_shape(name)
    assert (shape.linear_flops / 2 + vocabulary * matrices * shape.width) / 1e9 == pytest.approx(billions, rel=5e-4)


def test_the_studys_share_of_flops():
    """eviction.md, conversation at 50 %: 37.85 % of the pages are 35.0 % of an 8B Llama's prefill FLOPs."""
    with Workload.load([DATA / "conversation_trace.jsonl.gz"]) as workload:
        row = lru_curve(workload, Reuse.of(workload)).row(85449)
    assert saving(row, SHAPES["llama-3.1-8b"], GPUS["h100"]).share == pytest.approx(0.350, abs=5e-4)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"llama-3\.1-8b"):
        named_shape("gpt")
    with pytest.raises(ConfigError, match="h100"):
        named_gpu("tpu")
