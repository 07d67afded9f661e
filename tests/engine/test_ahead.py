"""What goes wrong between a launch and its landing is one request's own: all others answer as if it had not been."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from torch import nn

from radixkv.engine import Engine, batcher, choice, residence
from radixkv.engine.compiling import fuse_projections
from radixkv.engine.executor import Executor
from radixkv.engine.request import Request
from radixkv.errors import RequestInterrupted
from radixkv_kernels import backend
from tests.engine.test_pages import PAGE, alone, drive, ids, params, settled, submit, tiny


@pytest.fixture(autouse=True)
def references(monkeypatch):
    """The plain kernels run: the interpreter is slow, and nothing here depends on them."""
    monkeypatch.setattr(backend, "_INTERPRETED", False)


# -- interrupts -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered():
    """Four prompts, of which two begin alike, and what each is answered alone."""
    prompts = [ids(20, 1), ids(12, 2), ids(20, 1)[:13] + ids(6, 3), ids(17, 4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_INTERPRETED", False)
        return prompts, alone(prompts, params(6))


ONE, PASS = 1, 3  # who ends with it, at most: the request that it caught, or all of the pass whose tokens it lost

WHERE = {
    "before a launch": (Executor, "launch", "before", PASS),
    "when a pass is launched and nobody knows": (Executor, "launch", "after", PASS),
    "before the model runs": (residence.InPages, "forward", "before", PASS),
    "when the model has run": (residence.InPages, "forward", "after", PASS),
    "before a choice": (choice.Choice, "__init__", "before", PASS),
    "before a landing": (Executor, "land", "before", PASS),
    "after a landing": (Executor, "land", "after", PASS),
    "while a token is read": (choice.Choice, "read", "before", ONE),
    "before a page is published": (Executor, "publish", "before", ONE),
    "after a page is published": (Executor, "publish", "after", ONE),
    "before a token is accepted": (Request, "accept", "before", ONE),
    "after a token is accepted": (Request, "accept", "after", ONE),
    "while pages are reserved": (Executor, "reserve", "after", ONE),
    "while a plan is made": (batcher.Batcher, "_plan", "after", ONE),
    "while an answer that has ended is cleared away": (residence.InPages, "end", "after", ONE),
    "before a lookup": (Executor, "begin", "before", ONE),
}


@contextmanager
def interrupted(owner, name, when, number):
    """Within, the call of that number is interrupted, once."""
    real, calls = getattr(owner, name), count()

    def act(self, *args):
        due = next(calls) == number
        if due and when == "before":
            raise KeyboardInterrupt
        result = real(self, *args)
        if due:
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, act)
        yield


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("where", WHERE)
def test_an_interrupt_between_launch_and_landing_spoils_no_other_request(answered, where, number):
    prompts, expected = answered
    *place, most = WHERE[where]
    with tiny("pages", max_running=3) as engine:
        requests = [submit(engine, prompt, params(6)) for prompt in prompts[:2]]
        engine.step()
        engine.step()
        requests += [submit(engine, prompt, params(6)) for prompt in prompts[2:]]
        with interrupted(*place, number), pytest.raises(KeyboardInterrupt):
            drive(engine, requests, 40)
        drive(engine, requests, 40)
        for request, answer in zip(requests, expected, strict=True):
            assert request.error is None or isinstance(request.error, RequestInterrupted), request.error
            assert tuple(request.output) == answer[: len(request.output)]
            assert request.error is not None or len(request.output) == len(answer)
        assert sum(request.error is not None for request in requests) <= most
        settled(engine)
        assert engine.generate(prompts[:1], params(6))[0].token_ids == expected[0], "what was kept is right"


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_copy_that_fails_while_pages_are_reserved_ends_that_request_only(monkeypatch):
    good_prompt, bad_prompt = ids(20, 5), [*ids(50, 1)[:21], 3, *ids(5, 2)]
    with tiny("pages") as engine:
        engine.generate([ids(50, 1)], params(0))
        good = submit(engine, good_prompt)
        for _ in range(3):
            engine.step()
        bad = submit(engine, bad_prompt)

        def out_of_memory(*_):
            raise RuntimeError("device out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(residence, "copy_heads", out_of_memory)
            engine.step()
        assert "out of memory" in str(bad.error) and good.error is None
        assert [drive(engine, [good])[0], engine.generate([bad_prompt], params())[0].token_ids] == alone(
            [good_prompt, bad_prompt]
        )


class OutOfHostMemory:
    """Stands for torch, and has no buffer the first time that one is asked for."""

    def __init__(self):
        self.failed = 0

    def empty(self, *args, **options):
        if not self.failed:
            self.failed += 1
            raise RuntimeError("no pinned memory is left")
        return torch.empty(*args, **options)

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.mark.parametrize("after", [0, 3])
def test_a_launch_that_fails_after_the_model_ran_changes_no_seeded_answer(monkeypatch, after):
    prompts, sampling = [ids(20, 1), ids(9, 7)], params(8, temperature=1.0, seed=3)
    with tiny("pages") as engine:
        requests = [submit(engine, prompt, sampling) for prompt in prompts]
        for _ in range(after):
            engine.step()
        host = OutOfHostMemory()
        with monkeypatch.context() as patch:
            patch.setattr(choice, "torch", host)
            engine.step()
        assert host.failed == 1
        assert drive(engine, requests) == alone(prompts, sampling)


def test_a_retention_that_cannot_be_said_leaves_the_answer_as_it_is(caplog):
    def ask(completion):
        raise LookupError(f"nothing is known of {len(completion.token_ids)} tokens")

    with tiny("pages") as engine, caplog.at_level(logging.WARNING, logger="radixkv.engine"):
        request, other = submit(engine, ids(20, 1), retain_at_end=ask), submit(engine, ids(12, 2))
        assert drive(engine, [request, other]) == alone([ids(20, 1), ids(12, 2)])
        assert request.error is None and request.completion.finish_reason == "length"
        assert engine.cache.match(ids(20, 1)) >= 16, "it is kept as any other"
    assert "without its retention: LookupError: nothing is known of 10 tokens" in caplog.text


@pytest.mark.parametrize("cache", [True, False])
def test_requests_under_a_quota_are_seldom_preempted(cache):
    prompts = [ids(30, seed) for seed in range(4)]
    with tiny("pages", max_running=4) as engine:
        engine.cache.set_quota("a", max_pages=8)  # each needs all of it in the end
        requests = [submit(engine, prompt, params(30), namespace="a", cache=cache) for prompt in prompts]
        num_steps = 0
        while not all(request.finished for request in requests):
            engine.step()
            num_steps += 1
            assert num_steps < 1000, "somebody does not get on"
        assert [tuple(request.output) for request in requests] == alone(prompts, params(30))
        assert engine.stats().preemptions < num_steps / 5


# -- who writes where -------------------------------------------------------------------------------------------------


class Writes:
    """Stands before a runner in pages, and notes the pages that are written."""

    def __init__(self, runner):
        self._runner = runner
        self.pages: set[int] = set()

    def forward(self, works, *rest):
        for work in works:
            first, stop = work.position // PAGE, -(-(work.position + len(work.tokens)) // PAGE)
            self.pages.update(work.pages[first:stop].tolist())
        return self._runner.forward(works, *rest)

    def __getattr__(self, name):
        return getattr(self._runner, name)


@pytest.mark.parametrize("length", [17, 30, 33, 40, 45, 47])
def test_in_exact_mode_nobody_writes_to_a_page_that_others_find(record, length):
    prompt = ids(60, 1)
    settings = {"exact": True, "exact_block": 16, "prefill_chunk": 32, "mixed_tokens": 24}
    rows = []
    for between in (False, True):
        with tiny("pages", **settings) as engine:
            engine.generate([prompt], params(2))
            with engine.cache.acquire(prompt) as lease:
                published = lease.pages.tolist()
            assert len(published) == 48 // PAGE
            before = engine.store.kv[published].clone()
            if between:
                runner = engine.runner
                engine.runner = writes = Writes(runner)
                done = engine.generate([prompt[:length]], params(2))[0]
                engine.runner = runner
                assert done.cached_tokens == (length - 1) // 16 * 16
                assert writes.pages and not writes.pages & set(published)
            assert torch.equal(engine.store.kv[published], before)
            with record(engine) as logits:
                engine.generate([prompt], params(4))
            rows.append(logits[-4:])
    assert all(torch.equal(one, other) for one, other in zip(*rows, strict=True))


# -- what a model computes, and what a reader saw ---------------------------------------------------------------------


class GatedMlp(nn.Module):
    """A gated MLP that may clamp what is large, as some models do."""

    def __init__(self, limit: float | None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
        self.down_proj = nn.Linear(96, 64, bias=False)
        self.act_fn, self.limit = nn.SiLU(), limit

    def forward(self, x):
        gate, up = self.act_fn(self.gate_proj(x)), self.up_proj(x)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.down_proj(gate * up)


@pytest.mark.parametrize(("limit", "notes"), [(16.0, 0), (None, 1)])
def test_a_gated_mlp_is_fused_only_where_nothing_is_clamped(limit, notes):
    torch.manual_seed(0)
    model = nn.Sequential(GatedMlp(limit)).requires_grad_(False)
    x = torch.randn(4, 64) * 100
    before = model(x)
    assert len(fuse_projections(model)) == notes
    assert (type(model[0]) is GatedMlp) == (limit is not None)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-3 * float(before.abs().max()))


@pytest.mark.model
@pytest.mark.parametrize("attention", ["pages", "views"])
def test_a_session_keeps_the_text_its_reader_saw_where_a_stop_text_ends_inside_a_token(smollm2, attention):
    settings = {"dtype": "float32", "num_pages": 32, "max_context": 200, "device": "cpu", "attention": attention}
    with Engine("smollm2", **settings) as engine:
        free = engine.chat().send("Say hello in French.", params(10))
        pieces = [engine.tokenizer.decode([token]).strip() for token in free.token_ids]
        number = next(n for n, piece in enumerate(pieces) if n > 2 and len(piece) >= 4)
        chat = engine.chat()
        done = chat.send("Say hello in French.", params(10, stop=(pieces[number][1:3],)))
        assert done.finish_reason == "stop" and free.text.startswith(done.text)
        assert done.text.endswith(pieces[number][0]), "it ended inside a token"
        assert engine.tokenizer.decode(chat.tokens.tolist(), skip_special=False).endswith(done.text)
        settled(engine)
