"""Fixtures that several rooms share: the real model, and engines on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


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
