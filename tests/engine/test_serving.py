"""AsyncEngine: many readers, each of whom may go at any moment, and one thread that never leaks nor spins."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager, suppress

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from radixkv import errors
from radixkv.engine import AsyncEngine, Engine, RequestOptions, SamplingParams


def config(**settings: int) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": 256,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
        }
        | settings
    )


def params(count: int = 12, **settings: object) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, **settings)


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(10, 250, count).tolist()


@asynccontextmanager
async def served(**settings: object):
    """A served engine, which in the end has no lease, no leased page, no task and no thread left."""
    engine = Engine.random(
        config(), seed=1, **{"dtype": "float32", "num_pages": 64, "page_size": 8, "num_threads": 1} | settings
    )
    front = AsyncEngine(engine)
    try:
        yield front
        if front.alive:
            await front.call(at_rest)
    finally:
        await front.close()
    front._thread.join(5)
    assert not front._thread.is_alive() and not front._answers
    assert asyncio.all_tasks() == {asyncio.current_task()}


def at_rest(engine: Engine) -> None:
    stats = engine.cache.stats()
    assert not engine.busy
    assert (stats.num_leases, stats.num_leased, len(engine.cache.leases())) == (0, 0, 0)
    engine.cache.check()


def run(scenario) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(300):
            await scenario

    asyncio.run(bounded())
    for thread in threading.enumerate():
        if thread.name == "radixkv-engine":  # which told that it is gone, and may not have left its last line yet
            thread.join(5)
            assert not thread.is_alive()


# -- ten thousand careless readers ------------------------------------------------------------------------------------


async def one_reader(front: AsyncEngine, rng: np.random.Generator, tally: dict[str, int]) -> None:
    """Ask something, and go at a moment that the dice decide."""
    length, tenant = int(rng.integers(2, 40)), int(rng.integers(3))
    prompt = ids(60, tenant)[:length] + rng.integers(10, 250, int(rng.integers(1, 12))).tolist()
    options = RequestOptions(
        namespace=f"n{tenant}",
        tenant=f"t{tenant}",
        priority=int(rng.integers(0, 3)),
        cache=None if rng.integers(8) else False,
        deadline_s=None if rng.integers(20) else 0.002,
    )
    how, moment = int(rng.integers(4)), int(rng.integers(0, 9))
    asked = asyncio.ensure_future(front.submit(prompt, params(int(rng.integers(0, 6))), options))
    if how == 0:  # while it is put in the queue, or just after
        await turns(moment)
        asked.cancel()
        await asyncio.wait([asked])
        if asked.cancelled():
            tally["never begun"] += 1
        else:
            (await asked).cancel()
        return
    answer = await asked
    if how == 1:  # the task that waits for a chunk is cancelled
        reader = asyncio.ensure_future(answer.result())
        await turns(moment * 4)
        reader.cancel()
        with suppress(asyncio.CancelledError, errors.DeadlineExceeded):
            await reader
            tally["read to the end"] += 1
        answer.cancel()
        return
    count = 0
    with suppress(errors.DeadlineExceeded):
        async with answer:  # leaves after so many chunks, or after all of them
            async for chunk in answer:
                count += 1
                if chunk.completion is not None:
                    tally["read to the end"] += 1
                if how == 2 and count > moment:
                    break
    tally["gone in its prompt" if count == 0 else "gone later"] += 1
    answer.cancel()  # after the end it means nothing


async def turns(count: int) -> None:
    """Let the event loop turn so often."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_ten_thousand_requests_cancelled_at_random_moments_leave_nothing_behind():
    tally = dict.fromkeys(("never begun", "gone in its prompt", "gone later", "read to the end"), 0)

    async def scenario() -> None:
        async with served(num_pages=40, max_running=16, prefill_chunk=128, mixed_tokens=64, max_waiting=100_000) as front:

            async def readers(seed: int) -> None:
                rng = np.random.default_rng(seed)
                for _ in range(250):
                    await one_reader(front, rng, tally)

            await asyncio.gather(*(readers(seed) for seed in range(40)))
            await front.call(at_rest)
            stats = front.engine.stats()
            assert stats.preemptions > 0 and stats.cached_tokens > 0 and stats.cache.evicted_pages > 0
            assert stats.requests >= 10_000 - tally["never begun"]
            assert len((await (await front.submit(ids(20), params(5))).result()).token_ids) == 5

    run(scenario())
    assert min(tally.values()) >= 20, f"every moment came up: {tally}"


# -- one by one -------------------------------------------------------------------------------------------------------


def test_an_answer_read_together_with_others_is_the_answer_alone():
    async def scenario() -> None:
        async with served() as front:
            answers = [await front.submit(ids(30, seed), params(10)) for seed in range(6)]
            done = await asyncio.gather(*(answer.result() for answer in answers))
            for seed, completion in enumerate(done):
                again = await (await front.submit(ids(30, seed), params(10), RequestOptions(cache=False))).result()
                assert again.token_ids == completion.token_ids and completion.finish_reason == "length"

    run(scenario())


def test_what_cannot_be_asked_is_refused_and_harms_nobody():
    async def scenario() -> None:
        async with served() as front:
            good = await front.submit(ids(30), params(10))
            for prompt, error in (
                ([], errors.EmptyTokensError),
                ([999], errors.TokenRangeError),
                (ids(511) * 2, errors.PromptTooLong),
            ):
                with pytest.raises(error):
                    await front.submit(prompt, params())
            assert len((await good.result()).token_ids) == 10

    run(scenario())


class Poison:
    """Stands before a runner, and fails on every step that one token is part of."""

    def __init__(self, runner: object, token: int) -> None:
        self._runner, self._token = runner, token

    def forward(self, works, *rest):
        if any(self._token in work.tokens for work in works):
            raise RuntimeError("not this one")
        return self._runner.forward(works, *rest)

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)


def test_a_failing_request_never_takes_another_with_it():
    async def scenario() -> None:
        async with served() as front:
            expected = [(await (await front.submit(ids(20, seed), params(10))).result()).token_ids for seed in range(4)]
            await front.call(lambda engine: engine.cache.flush())
            front.engine.runner = Poison(front.engine.runner, 255)
            good = [await front.submit(ids(20, seed), params(10)) for seed in range(4)]
            bad = [await front.submit([*ids(5, seed), 255, 255], params(10)) for seed in range(3)]
            outcomes = await asyncio.gather(*(answer.result() for answer in (*good, *bad)), return_exceptions=True)
            assert [outcome.token_ids for outcome in outcomes[:4]] == expected
            assert all(isinstance(outcome, RuntimeError) for outcome in outcomes[4:])
            assert front.alive

    run(scenario())


def test_what_a_call_returns_or_raises_reaches_the_caller():
    def fail(engine: Engine) -> None:
        raise KeyError("mine")

    async def scenario() -> None:
        async with served() as front:
            running = await front.submit(ids(30), params(50))
            assert await front.call(lambda engine: threading.current_thread().name) == "radixkv-engine"
            with pytest.raises(KeyError, match="mine"):
                await front.call(fail)
            assert front.alive and len((await running.result()).token_ids) == 50

    run(scenario())


def test_a_call_whose_caller_went_away_is_done_all_the_same():
    async def scenario() -> None:
        async with served() as front:
            seen: list[int] = []
            waits = asyncio.ensure_future(front.call(lambda engine: seen.append(1)))
            await turns(1)
            waits.cancel()
            await asyncio.wait([waits])
            await front.call(lambda engine: seen.append(2))
            assert seen == [1, 2]

    run(scenario())


def test_closing_ends_what_runs_and_what_waits_and_refuses_the_rest():
    async def scenario() -> None:
        async with served(max_running=2) as front:
            answers = [await front.submit(ids(30, seed), params(400)) for seed in range(5)]
            assert (await anext(answers[0])).token_id is not None
            await asyncio.gather(front.close(), front.close())
            assert not front.alive
            for answer in answers:
                assert (await answer.result()).finish_reason == "cancelled"
            with pytest.raises(errors.EngineClosed):
                await front.submit(ids(5), params())
            with pytest.raises(errors.EngineClosed):
                await front.call(lambda engine: None)

    run(scenario())


def test_a_full_queue_refuses_and_says_when_to_come_again():
    async def scenario() -> None:
        async with served(max_running=1, max_waiting=2) as front:
            answers = [await front.submit(ids(30), params(300))]
            await anext(answers[0])
            answers += [await front.submit(ids(30, seed), params(1)) for seed in (1, 2)]
            with pytest.raises(errors.QueueFull):
                await front.submit(ids(30, 3), params(1))
            for answer in answers:
                answer.cancel()

    run(scenario())


def test_a_queue_that_one_tenant_fills_still_has_a_place_for_another():
    async def scenario() -> None:
        def asked(seed: int, tenant: str):
            return front.submit(ids(30, seed), params(300), RequestOptions(tenant=tenant))

        async with served(max_running=1, max_waiting=4) as front:
            answers = [await asked(0, "x")]
            await anext(answers[0])
            answers += [await asked(seed, "x") for seed in range(1, 5)]
            with pytest.raises(errors.QueueFull):
                await asked(5, "x")
            answers += [await asked(seed, "y") for seed in (6, 7)]
            for tenant in ("x", "y"):
                with pytest.raises(errors.QueueFull):
                    await asked(8, tenant)
            for answer in answers:
                answer.cancel()

    run(scenario())


def test_a_deadline_ends_a_request_that_waits_and_one_that_runs():
    async def scenario() -> None:
        async with served(max_running=1) as front:
            runs = await front.submit(ids(30), params(480), RequestOptions(deadline_s=0.2))
            await anext(runs)
            waits = await front.submit(ids(30), params(480), RequestOptions(deadline_s=0.001))
            for answer in (waits, runs):
                with pytest.raises(errors.DeadlineExceeded):
                    await answer.result()

    run(scenario())


def test_an_idle_engine_takes_no_steps():
    async def scenario() -> None:
        async with served() as front:
            steps, step = [], front.engine.step
            front.engine.step = lambda: steps.append(1) or step()
            await asyncio.sleep(0.3)  # time in which it might spin
            assert steps == []
            await (await front.submit(ids(30), params(10))).result()
            assert len(steps) == 10
            await asyncio.sleep(0.3)
            assert len(steps) == 10

    run(scenario())


def test_the_first_chunk_says_what_was_cached():
    async def scenario() -> None:
        async with served() as front:
            await (await front.submit(ids(30), params(1))).result()
            answer = await front.submit(ids(30), params(3))
            assert [chunk.cached_tokens async for chunk in answer] == [24] * 4

    run(scenario())


# -- text -------------------------------------------------------------------------------------------------------------


class Script:
    """Stands before a runner, and makes each request's likeliest next token that of a text."""

    def __init__(self, runner, prompt_tokens: int, script: list[int]) -> None:
        self._runner, self._start, self._script = runner, prompt_tokens, script

    def forward(self, works, *rest):
        logits = torch.full_like(self._runner.forward(works, *rest), -10.0)
        rows = iter(logits)
        for work in works:
            if work.wants_logits:
                next(rows)[self._script[work.position + len(work.tokens) - self._start]] = 10.0
        return logits

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)


@pytest.mark.parametrize(
    "text",
    [
        "Ünïcödé 👩‍🚀🧑🏽‍🌾 and 🇩🇪!",
        "日本語のテキスト、中文、한국어。",
        "a\u0301 ☃️ नमस्ते 𒀀𒁀",
    ],
)
def test_text_streams_in_whole_characters_and_the_chunks_are_the_answer(fp32_engine, text):
    tokenizer = fp32_engine.tokenizer
    script = [int(token) for token in tokenizer.encode(text)]
    shape = config(vocab_size=49_152)

    async def scenario() -> None:
        engine = Engine.random(shape, tokenizer=tokenizer, dtype="float32", num_pages=64, num_threads=1)
        engine.runner = Script(engine.runner, 3, script)
        front = AsyncEngine(engine)
        try:
            answers = [await front.submit([5, 6, 7 + n], params(len(script))) for n in range(3)]
            for answer in answers:
                chunks = [chunk async for chunk in answer]
                assert [chunk.token_id for chunk in chunks] == [*script, None]
                assert "".join(chunk.text for chunk in chunks) == text == chunks[-1].completion.text
                assert not any("\N{REPLACEMENT CHARACTER}" in chunk.text for chunk in chunks)
                assert len([chunk for chunk in chunks if chunk.text]) > 3, "it streams"
        finally:
            await front.close()

    assert len(script) > len(text) / 2
    run(scenario())


def test_a_thread_that_dies_leaves_nobody_waiting():
    async def crash():
        async with served() as front:
            answer = await front.submit(ids(20), params(400))

            def die(_: Engine) -> None:
                raise SystemExit

            calls = [asyncio.create_task(front.call(act)) for act in (die, Engine.stats)]
            for call in calls:
                with pytest.raises(errors.EngineClosed):
                    await call
            with pytest.raises(errors.EngineClosed):
                await answer.result()
            await front.ended()
            assert not front.alive

    asyncio.run(crash())
