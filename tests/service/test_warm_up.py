"""Warming up goes on beside the requests: it may take long or fail, and nobody waits for it or hears of it."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from radixkv.engine.paged import PagedRunner
from radixkv_kernels import backend
from radixkv_service.service import Service
from radixkv_service.settings import load_settings


@pytest.fixture(autouse=True)
def references(monkeypatch):
    """Off a GPU the plain kernels run: the interpreter is slow."""
    monkeypatch.setattr(backend, "_INTERPRETED", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose tokens are bytes."""
    path = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return str(path)


def live(folder, act, **settings):
    """Run `act` on a service whose engine is ready."""

    async def run():
        given = {"model": folder, "dtype": "float32", "num_pages": 64, "device": "cpu", "attention": "pages", **settings}
        service = Service(load_settings(given))
        service.start()
        await service.settled.wait()
        try:
            assert service.status == "ok"
            return await act(service)
        finally:
            await service.close()

    return asyncio.run(run())


async def answer(service):
    """A request's answer by way of the engine's thread."""
    from radixkv.engine import SamplingParams

    return await (await service.front.submit("hello", SamplingParams(max_tokens=4, ignore_eos=True))).result()


@pytest.fixture
def slow(monkeypatch):
    """Warming up takes until it is told to go on; (it has begun, it may go on)."""
    begun, may_end = threading.Event(), threading.Event()

    def warm_up(self, progress):
        progress("compile", 0, 1)
        begun.set()
        assert may_end.wait(60)
        progress("compile", 1, 1)
        for done in range(4):
            progress("graphs", done, 3)

    monkeypatch.setattr(PagedRunner, "warm_up", warm_up)
    yield begun, may_end
    may_end.set()


def test_requests_are_answered_while_it_warms_up_and_each_stage_is_two_lines(folder, slow, caplog):
    begun, may_end = slow

    async def act(service):
        await asyncio.to_thread(begun.wait, 60)
        assert service.unavailable() is None and service.still_loading
        assert len((await answer(service)).token_ids) == 4
        may_end.set()
        await asyncio.to_thread(service._loader.join, 60)
        assert service.unavailable() is None and not service.still_loading

    with caplog.at_level(logging.INFO, "radixkv.service"):
        live(folder, act)
    lines = [line for line in caplog.messages if line.startswith("warming up")]
    assert len(lines) == 4
    assert lines[0] == "warming up: compiling layers; requests are answered meanwhile"
    assert lines[3].startswith("warming up: capturing CUDA graphs took")


def test_a_server_that_ends_does_not_wait_for_it(folder, slow):
    begun, may_end = slow

    async def act(service):
        await asyncio.to_thread(begun.wait, 60)
        return service

    service = live(folder, act)
    assert service.still_loading, "so the process leaves without it"
    may_end.set()
    service._loader.join(60)


def test_where_it_fails_the_log_says_so_and_requests_are_answered(folder, monkeypatch, caplog):
    def warm_up(self, progress):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(PagedRunner, "warm_up", warm_up)

    async def act(service):
        await asyncio.to_thread(service._loader.join, 60)
        assert service.unavailable() is None
        assert len((await answer(service)).token_ids) == 4

    live(folder, act)
    assert "warming up failed" in caplog.text and "no compiler here" in caplog.text


@pytest.mark.parametrize(("given", "field"), [("pages", "attention"), (False, "graphs"), (False, "compile")])
def test_how_a_gpu_is_used_is_an_option_and_a_variable(given, field, monkeypatch):
    assert getattr(load_settings({field: given}).engine_config(), field) == given
    monkeypatch.setenv(f"RADIXKV_{field.upper()}", str(given))
    assert getattr(load_settings({}).engine_config(), field) == given


@pytest.mark.gpu
def test_a_gpu_answers_before_and_after_as_it_warms_up(folder, caplog):
    async def act(service):
        first = await answer(service)
        await asyncio.to_thread(service._loader.join, 300)
        return first, await answer(service)

    with caplog.at_level(logging.INFO, "radixkv.service"):
        first, second = live(folder, act, device="cuda", attention="auto", dtype="bfloat16")
    assert len(first.token_ids) == len(second.token_ids) == 4
    assert "capturing CUDA graphs took" in caplog.text and "no CUDA graphs" not in caplog.text
