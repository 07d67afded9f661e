"""A hit answers as a miss, and both answer as transformers does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from radixkv.engine import Engine, SamplingParams
from radixkv.engine.models import random_model

pytestmark = pytest.mark.model
GREEDY64 = SamplingParams(max_tokens=64, ignore_eos=True)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reference(smollm2):
    """transformers' own SmolLM2 in fp32: [T] ids -> [T, V] logits."""
    model = AutoModelForCausalLM.from_pretrained(str(smollm2.path), dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(ids: np.ndarray) -> torch.Tensor:
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float()

    return logits


def check(engine, record, reference, prompt, params=GREEDY64, tolerance=TOLERANCE):
    """Answer `prompt`; every step's logits and every token must be the reference's. Returns the completion."""
    with record(engine) as rows:
        done = engine.generate([prompt], params)[0]
    ids = np.concatenate([prompt, np.array(done.token_ids, np.int32)])
    expected = reference(ids[:-1])[len(prompt) - 1 :]
    got = torch.stack(rows)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance
    assert expected.argmax(-1).tolist() == list(done.token_ids)
    assert done.cached_tokens + done.computed_tokens == done.prompt_tokens == len(prompt)
    engine.cache.check()
    return done


@pytest.fixture(scope="module")
def text(smollm2):
    """Real text as token ids, long enough for every case."""
    import json.decoder
    from pathlib import Path

    from radixkv.engine.tokenizer import Tokenizer

    return Tokenizer(smollm2.path).encode(Path(json.decoder.__file__).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_every_kind_of_hit_has_the_logits_and_the_answer_of_transformers(smollm2, record, reference, text, page_size):
    with Engine("smollm2", dtype="float32", page_size=page_size, num_pages=4096 // page_size, prefill_chunk=96) as engine:
        prompt = text[:300]
        cold = check(engine, record, reference, prompt)
        assert cold.cached_tokens == 0

        on_a_page = check(engine, record, reference, np.concatenate([text[:256], text[1000:1040]]))
        assert on_a_page.cached_tokens == 256

        inside_a_page = check(engine, record, reference, np.concatenate([text[:250], text[2000:2040]]))
        assert inside_a_page.cached_tokens == 250

        answer = np.array(cold.token_ids, np.int32)
        reused = check(engine, record, reference, np.concatenate([prompt, answer, text[500:520]]))
        assert reused.cached_tokens >= (300 + 63) // page_size * page_size

        forks = [np.concatenate([prompt, answer[:40], text[start : start + 9]]) for start in (600, 700)]
        for fork in forks:
            assert check(engine, record, reference, fork).cached_tokens >= 340 // page_size * page_size

        evicted = engine.cache.stats()
        engine.cache.evict(evicted.num_evictable - 130 // page_size)
        partly = check(engine, record, reference, prompt)
        assert partly.cached_tokens < 299
        assert engine.cache.stats().num_leases == 0


def test_prompts_that_run_together_answer_as_they_do_alone(fp32_engine, text):
    prompts = [text[:200], np.concatenate([text[:150], text[900:960]]), text[300:420]]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    alone = [fp32_engine.generate([prompt], params, cache=False)[0].token_ids for prompt in prompts]
    together = fp32_engine.generate(prompts, params)
    assert [done.token_ids for done in together] == alone
    assert together[1].cached_tokens == 150, "the second prompt attaches to pages the first one has just published"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_mode_is_equal_bit_for_bit(smollm2, record, text, dtype):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    with Engine("smollm2", dtype=dtype, exact=True, exact_block=64, num_pages=512) as engine:
        prompts = [text[:300], np.concatenate([text[:250], text[800:870]]), text[:450]]
        with record(engine) as cold:
            misses = engine.generate(prompts, params, cache=False)
        engine.generate([text[:280]], params)
        with record(engine) as hot:
            hits = [engine.generate([prompt], params)[0] for prompt in prompts]
        assert [done.cached_tokens for done in hits] == [256, 192, 256]
        assert [done.token_ids for done in hits] == [done.token_ids for done in misses]
        by_bits = lambda rows: sorted(row.numpy().tobytes() for row in rows)  # noqa: E731
        assert by_bits(hot) == by_bits(cold)
        engine.cache.check()


def test_bf16_hits_differ_from_misses_by_a_bounded_amount(smollm2, record, text, capsys):
    params = SamplingParams(max_tokens=1)
    worst = 0.0
    with Engine("smollm2", dtype="bfloat16", num_pages=1024) as engine:
        for cut in (64, 200, 333):
            prompt = text[: cut + 60]
            with record(engine) as miss:
                engine.generate([prompt], params, cache=False)
            engine.generate([text[:cut]], params)
            with record(engine) as hit:
                done = engine.generate([prompt], params)[0]
            assert done.cached_tokens >= cut - 16
            worst = max(worst, float((miss[0] - hit[0]).abs().max()))
            engine.cache.flush()
    with capsys.disabled():
        print(f"\n  bf16, largest logit difference of a hit from a miss: {worst:.3f}")
    assert 0 < worst < 2.0


TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
FAMILIES = {
    "llama": LlamaConfig(**TINY, num_key_value_heads=2, max_position_embeddings=512),
    "llama, one KV head": LlamaConfig(**TINY, num_key_value_heads=1, max_position_embeddings=512),
    "llama, as many KV heads": LlamaConfig(**TINY, num_key_value_heads=4, max_position_embeddings=512),
    "qwen2": Qwen2Config(**TINY, num_key_value_heads=2, max_position_embeddings=512),
    "qwen3": Qwen3Config(**TINY, num_key_value_heads=2, head_dim=32, max_position_embeddings=512),
    "mistral": MistralConfig(**TINY, num_key_value_heads=2, max_position_embeddings=512, sliding_window=None),
    "mistral, sliding window": MistralConfig(**TINY, num_key_value_heads=2, max_position_embeddings=512, sliding_window=40),
    "qwen2, sliding window": Qwen2Config(
        **TINY,
        num_key_value_heads=2,
        max_position_embeddings=512,
        use_sliding_window=True,
        sliding_window=24,
        max_window_layers=1,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_transformers_does(family, record, prompt_ids):
    config = FAMILIES[family]
    model, _ = random_model(config, dtype=torch.float32, device=torch.device("cpu"), attn_implementation="eager", seed=5)

    @torch.inference_mode()
    def reference(ids):
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]

    with Engine.random(config, seed=5, dtype="float32", num_pages=256, page_size=8, prefill_chunk=32) as engine:
        prompt = prompt_ids(120, high=256)
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        cold = check(engine, record, reference, prompt, params)
        again = np.concatenate([prompt, np.array(cold.token_ids[:7], np.int32), prompt_ids(9, 3, high=256)])
        assert check(engine, record, reference, again, params).cached_tokens >= 120
        assert check(engine, record, reference, np.concatenate([prompt[:85], again[:20]]), params).cached_tokens == 85
