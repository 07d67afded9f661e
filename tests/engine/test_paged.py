"""The runner over pages gives what the model gives by itself, however its tokens come and wherever its pages lie."""

from __future__ import annotations

import copy
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, LlamaConfig, MistralConfig, Qwen3Config

from radixkv.engine.compiling import compile_layers, decoder_layers, fuse_projections, layer_calls, use_compiled
from radixkv.engine.cuda import DryStep, attending
from radixkv.engine.paged import _SAMPLE_ROWS, PagedRunner, PagedWork
from radixkv.store.device import DeviceStore, PageShape
from radixkv_kernels import backend
from radixkv_kernels.backend import triton


def configs(hidden_size, head_dim):
    """Tiny models of several families."""
    shape = {
        "hidden_size": hidden_size,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "vocab_size": 300,
        "max_position_embeddings": 512,
    }
    some = ["full_attention", "sliding_attention", "full_attention"]
    return {
        "llama": LlamaConfig(**shape),
        "qwen3": Qwen3Config(**shape, use_sliding_window=True, sliding_window=7, layer_types=some),
        "mistral": MistralConfig(**shape, sliding_window=9),
        "gemma2": Gemma2Config(**shape, sliding_window=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
        "gpt-oss": GptOssConfig(**shape, sliding_window=8, num_local_experts=4, num_experts_per_tok=2),
    }


CONFIGS = configs(64, 16)
WIDE = configs(256, 64)
PLAIN = ["llama", "qwen3", "mistral"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def references(monkeypatch):
    """Off a GPU the plain kernels run: the interpreter is slow, and one test at the end gives it its turn."""
    if triton is not None:
        monkeypatch.setattr(backend, "_INTERPRETED", False)


def random_model(config, dtype, device):
    """Of random weights, large enough for the attention to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.dim() == 1 else 0.15) + (parameter.dim() == 1))
    return model.to(device, dtype).eval().requires_grad_(False)


class Bench:
    """A runner beside the model as transformers runs it, and a pool whose pages are handed out in no order."""

    def __init__(
        self, config, page_size=4, *, device=CPU, dtype=torch.float32, graphs=False, compiled=False, num_pages=None
    ):
        self.own, model = (random_model(config, dtype, device) for _ in range(2))
        shape = PageShape(config.num_hidden_layers, page_size, config.num_key_value_heads, config.head_dim, dtype)
        store = DeviceStore(shape, num_pages or 1024 // page_size, device)
        store.kv.fill_(float("nan"))  # what nobody wrote must not matter
        self.runner = PagedRunner(model, store, device, graphs=graphs, compile=compiled)
        self.page_size = page_size
        self._free = np.random.default_rng(1).permutation(store.num_pages).astype(np.int32)

    def request(self, num_tokens, seed=0):
        """[n] token ids, and pages for them."""
        count = -(-num_tokens // self.page_size)
        pages, self._free = self._free[:count], self._free[count:]
        ids = np.random.default_rng(seed).integers(0, 300, num_tokens, dtype=np.int32)
        return ids, pages

    @torch.inference_mode()
    def expected(self, ids):
        """[n, V] logits of the model alone."""
        tokens = torch.from_numpy(ids.astype(np.int64))[None].to(self.runner.device)
        return self.own(input_ids=tokens, use_cache=False).logits[0]


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.fixture(params=[False, True], ids=["as it is", "padded"])
def padded(request):
    """On a CPU `graphs` pads steps as for a graph, and runs them."""
    return request.param


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_prefill_in_any_chunks_and_decode_equal_the_model(name, page_size, padded):
    bench = Bench(CONFIGS[name], page_size, graphs=padded)
    ids, pages = bench.request(37)
    want = bench.expected(ids)
    cuts = [0, 19, 20, 33, 34, 35, 36, 37]
    for start, stop in pairwise(cuts):
        logits = bench.runner.forward([PagedWork(ids[start:stop], start, pages, wants_logits=True)])
        close(logits, want[stop - 1 : stop])


@pytest.mark.parametrize("name", CONFIGS)
def test_requests_in_one_step_do_not_see_each_other(name, padded):
    bench = Bench(CONFIGS[name], graphs=padded)
    requests = [bench.request(n, seed) for seed, n in enumerate((30, 5, 21, 17))]
    want = [bench.expected(ids) for ids, _ in requests]
    for start, stop in ((0, 5), (5, 16), (16, 17), (17, 30)):
        works, rows = [], []
        for (ids, pages), logits in zip(requests, want, strict=True):
            part = ids[start:stop]
            if len(part):
                asks = len(works) != 1
                works.append(PagedWork(part, start, pages, wants_logits=asks))
                rows += [logits[start + len(part) - 1]] if asks else []
        close(bench.runner.forward(works), torch.stack(rows))


def test_a_shared_prefix_is_read_where_another_wrote_it(padded):
    bench = Bench(CONFIGS["llama"], graphs=padded)
    ids, pages = bench.request(24)
    bench.runner.forward([PagedWork(ids[:16], 0, pages, wants_logits=False)])
    works, want = [], []
    for seed in (5, 6, 7):
        rest, own = bench.request(3, seed)
        works.append(PagedWork(rest, 16, np.concatenate([pages[:4], own]), wants_logits=True))
        want.append(bench.expected(np.concatenate([ids[:16], rest]))[-1])
    close(bench.runner.forward(works), torch.stack(want))


def test_nobody_asks_for_logits_and_none_come(padded):
    bench = Bench(CONFIGS["llama"], graphs=padded)
    ids, pages = bench.request(6)
    assert bench.runner.forward([PagedWork(ids, 0, pages, wants_logits=False)]).shape == (0, 300)


def test_tokens_that_only_the_device_knows_give_the_same(padded):
    bench = Bench(CONFIGS["llama"], graphs=padded)
    requests = [bench.request(n, seed) for seed, n in enumerate((9, 12, 10))]
    bench.runner.forward([PagedWork(ids[:-1], 0, pages, wants_logits=False) for ids, pages in requests])
    previous = torch.tensor([77, int(requests[2][0][-1]), int(requests[0][0][-1])])
    unknown = np.array([-1], np.int32)
    works = [
        PagedWork(unknown if source >= 0 else ids[-1:], len(ids) - 1, pages, wants_logits=True, source=source)
        for (ids, pages), source in zip(requests, (2, -1, 1), strict=True)
    ]
    close(bench.runner.forward(works, previous), torch.stack([bench.expected(ids)[-1] for ids, _ in requests]))


def test_padding_writes_no_page():
    bench = Bench(CONFIGS["llama"], graphs=True)
    ids, pages = bench.request(5)
    bench.runner.forward([PagedWork(ids, 0, pages, wants_logits=False)])  # padded to 8
    written = bench.runner.store.kv.isfinite().all(2).all(1).all(-1).all(-1)  # [P, S]
    assert int(written.sum()) == 5
    assert written[pages].flatten()[:5].all()


def test_steps_beyond_the_largest_graph_run_without(padded):
    bench = Bench(CONFIGS["llama"], 16, graphs=padded)
    ids, pages = bench.request(540)
    want = bench.expected(ids)
    close(bench.runner.forward([PagedWork(ids[:-1], 0, pages, wants_logits=True)]), want[-2:-1])
    close(bench.runner.forward([PagedWork(ids[-1:], 539, pages, wants_logits=True)]), want[-1:])


@pytest.mark.parametrize("name", PLAIN)
def test_projections_on_one_input_may_be_one_product(name):
    bench = Bench(CONFIGS[name])
    assert len(fuse_projections(bench.runner.model)) == 2
    ids, pages = bench.request(11)
    close(bench.runner.forward([PagedWork(ids, 0, pages, wants_logits=True)]), bench.expected(ids)[-1:])


@pytest.mark.parametrize(("name", "kinds"), [("llama", 1), ("qwen3", 2), ("mistral", 1)])
def test_layers_of_one_kind_are_compiled_once_for_any_number_of_rows(name, kinds):
    torch._dynamo.reset()
    bench = Bench(CONFIGS[name], 16)
    runner = bench.runner
    fuse_projections(runner.model)
    layers = decoder_layers(runner.model, runner.num_layers)
    compiled, ran = [], []

    def backend(graph, inputs):
        compiled.append(graph)

        def run(*arguments):
            ran.append(graph)
            return graph.forward(*arguments)

        return run

    with torch.inference_mode():
        assert compile_layers(layer_calls(layers, lambda: runner._dry_run(_SAMPLE_ROWS[0])), backend=backend)
    use_compiled(layers)
    ids, pages = bench.request(53)
    want = bench.expected(ids)
    cuts = [0, 13, 15, 31, 47, 51, 52, 53]  # the last steps have one row, which no code was compiled for
    ran.clear()
    for start, stop in pairwise(cuts):
        logits = runner.forward([PagedWork(ids[start:stop], start, pages, wants_logits=True)])
        close(logits, want[stop - 1 : stop])
    assert len(compiled) == kinds
    assert len(ran) == 5 * runner.num_layers


def test_a_layer_that_cannot_be_compiled_runs_as_it_is(caplog):
    bench = Bench(CONFIGS["llama"])
    layers = decoder_layers(bench.runner.model, 3)

    def refuses(graph, inputs):
        raise RuntimeError("no such thing here")

    torch._dynamo.reset()
    with torch.inference_mode():
        assert not compile_layers(layer_calls(layers, lambda: bench.runner._dry_run(4)), backend=refuses)
    assert "no such thing here" in caplog.text
    ids, pages = bench.request(7)
    close(bench.runner.forward([PagedWork(ids, 0, pages, wants_logits=True)]), bench.expected(ids)[-1:])


def test_a_dry_run_touches_no_page():
    bench = Bench(CONFIGS["llama"])
    step = DryStep()
    with torch.inference_mode(), attending(step):
        bench.runner.model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    assert step.num_layers == 3
    assert bench.runner.store.kv.isnan().all()


def test_a_closed_runner_lets_go_of_the_pages_and_leaves_the_model_usable():
    bench = Bench(CONFIGS["llama"], graphs=True)
    model, ids, pages = bench.runner.model, *bench.request(6)
    bench.runner.forward([PagedWork(ids, 0, pages, wants_logits=False)])
    kv = weakref.ref(bench.runner.store.kv)
    bench.runner.close()
    store = DeviceStore(bench.runner.store.shape, 8, CPU)
    bench.runner = PagedRunner(model, store, CPU, graphs=False, compile=False)
    assert kv() is None
    close(bench.runner.forward([PagedWork(ids, 0, np.arange(2), wants_logits=True)]), bench.expected(ids)[-1:])


def test_the_interpreted_kernels_give_the_same(monkeypatch):
    if triton is None or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(backend, "_INTERPRETED", True)
    bench = Bench(CONFIGS["gemma2"])
    ids, pages = bench.request(21)
    want = bench.expected(ids)
    for start, stop in ((0, 20), (20, 21)):
        logits = bench.runner.forward([PagedWork(ids[start:stop], start, pages, wants_logits=True)])
        close(logits, want[stop - 1 : stop])


def _decode(bench, num_requests, *, greedy, num_steps=3):
    """[steps, n, V] logits: prompts, then one token a step, given ones or greedy ones that never leave the device."""
    requests = [bench.request(40 + 3 * n, seed=n) for n in range(num_requests)]
    logits = [bench.runner.forward([PagedWork(ids[:-num_steps], 0, pages, wants_logits=True) for ids, pages in requests])]
    for step in range(num_steps - 1):
        works = [
            PagedWork(ids[position : position + 1], position, pages, wants_logits=True, source=row if greedy else -1)
            for row, (ids, pages) in enumerate(requests)
            for position in (len(ids) - num_steps + step,)
        ]
        logits.append(bench.runner.forward(works, logits[-1].argmax(-1)))
    return torch.stack(logits)


@pytest.mark.gpu
@pytest.mark.parametrize("num_requests", [1, 2, 3, 8, 20, 64])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_graphs_and_eager_give_the_same_tokens(name, num_requests):
    config, cuda = WIDE[name], torch.device("cuda")
    eager, graphed = (Bench(config, 16, device=cuda, graphs=graphs, num_pages=1024) for graphs in (False, True))
    want, got = _decode(eager, num_requests, greedy=True), _decode(graphed, num_requests, greedy=True)
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
    assert any(bucket.graph is not None for bucket in graphed.runner._graphs._ready.values())


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_compiled_layers_stay_close(graphs):
    torch._dynamo.reset()
    config, cuda = WIDE["llama"], torch.device("cuda")
    plain = Bench(config, 16, device=cuda, num_pages=1024)
    fast = Bench(config, 16, device=cuda, graphs=graphs, compiled=True, num_pages=1024)
    want = _decode(plain, 4, greedy=False)
    before = _decode(fast, 4, greedy=False)
    if graphs:
        fast.runner._graphs.buckets = (1, 4, 16)
    fast.runner.warm_up()
    for got in (before, _decode(fast, 4, greedy=False)):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
