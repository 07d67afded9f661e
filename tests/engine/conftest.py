"""Helpers of the engine's tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch


class Recorder:
    """Stands before a runner and keeps every row of logits it gives out."""

    def __init__(self, runner):
        self._runner = runner
        self.logits: list[torch.Tensor] = []

    def forward(self, works, *rest):
        logits = self._runner.forward(works, *rest)
        self.logits += [row.float().clone() for row in logits]
        return logits

    def __getattr__(self, name):
        return getattr(self._runner, name)


@pytest.fixture
def record():
    """Record the logits of an engine's requests: `with record(engine) as logits: ...`."""
    from contextlib import contextmanager

    @contextmanager
    def recording(engine):
        engine.runner = Recorder(engine.runner)
        try:
            yield engine.runner.logits
        finally:
            engine.runner = engine.runner._runner

    return recording


@pytest.fixture
def prompt_ids():
    """Seeded token ids below 40,000."""

    def make(num_tokens: int, seed: int = 0, high: int = 40_000) -> np.ndarray:
        return np.random.default_rng(seed).integers(100, high, num_tokens, dtype=np.int32)

    return make
