"""radixkv under the benchmark's interface."""

from __future__ import annotations

import numpy as np

from bench.engine.rivals import Answer
from radixkv.engine import Engine, SamplingParams


class Radix:
    """The embedded engine; prompts are whole token sequences, nothing is known of sessions."""

    def __init__(self, **settings: object) -> None:
        self.engine = Engine("smollm2", pool_bytes=1 << 30, **settings)

    def answer(self, key: object, prompt: np.ndarray, num_tokens: int, shared: int) -> Answer:
        """Answer one prompt."""
        return self.answer_all([prompt], num_tokens)[0]

    def answer_all(self, prompts: list[np.ndarray], num_tokens: int) -> list[Answer]:
        """Answer several prompts together."""
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        return [
            Answer(list(done.token_ids), done.ttft_s, done.total_s, done.computed_tokens)
            for done in self.engine.generate(prompts, params)
        ]
