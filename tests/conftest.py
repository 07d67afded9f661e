"""Fixtures that several rooms share: the real model, and engines on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*"))
if not HAS_GPU:  # before Triton is imported: its interpreter runs the kernels here
    os.environ.setdefault("TRITON_INTERPRET", "1")

import radixkv.cache
import radixkv.tree

NATIVE = not radixkv.tree.__file__.endswith(".py")
"""Whether the compiled core is under test (`make test-native`)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what looks inside the source where it is not what runs, and what needs a GPU where there is none."""
    if NATIVE:
        for item in items:
            if item.get_closest_marker("pure") is not None:
                item.add_marker(pytest.mark.skip(reason="looks inside the Python source"))
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_report_header() -> str:
    """Say which core is under test."""
    return f"radixkv core: {'compiled' if NATIVE else 'Python'} ({radixkv.cache.__file__})"


@pytest.fixture(scope="session")
def smollm2():
    """The real model's folder, fetched and converted once into the cache folder."""
    from radixkv.engine.models import resolve_model

    return resolve_model("smollm2")


@pytest.fixture(scope="session")
def fp32_engine(smollm2) -> Iterator[object]:
    """One SmolLM2 engine in fp32 for tests that leave nothing behind."""
    from radixkv.engine import Engine

    with Engine("smollm2", dtype="float32", num_pages=2048) as engine:
        yield engine
