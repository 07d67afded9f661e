"""The rivals by name, and those that cannot be measured."""

from __future__ import annotations

from bench.index.index import Made

RIVALS = {
    "sglang-python": Made("bench.rivals.sglang:SglangIndex", "python", "sglang", "page 1"),
    "sglang-rust": Made("bench.rivals.sglang:SglangIndex", "rust", "sglang", "page 1, its default"),
    "vllm": Made("bench.rivals.vllm:VllmIndex", "list[int]", "vllm", "sha256, block 16"),
    "dynamo": Made("bench.rivals.dynamo:DynamoIndex", "list[int]", "ai-dynamo-runtime", "block 16, never evicts"),
}
ABSENT = {"mini-sglang": "is not on PyPI, so there is no wheel to install"}
EVICTING = {"sglang-python": True, "sglang-rust": True, "vllm": False}
"""Those that keep to a capacity, and whether they have a call to evict."""
