"""The runner over pages: token ids and page tables of several requests in, logits out.

    works ──▶ Batch (host) ──▶ one copy ──▶ layers, as a CUDA graph where one fits ──▶ head, for rows that want logits
                                              each writes its KV into pages and attends over them

On a GPU a step is only put in line: whoever wants the logits' values waits for them. Where a graph does not fit (more than
512 rows, or an unusual plan) the same model runs kernel by kernel.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from radixkv.engine.compiling import (
    LayerCall,
    compile_layers,
    decoder_layers,
    layer_calls,
    use_compiled,
    use_original,
)
from radixkv.engine.cuda import PAGED_ATTENTION, DryStep, PagedStep, attach_store, attending, detach_store, geometry_of
from radixkv.engine.graphs import BUCKETS, ROW_KINDS, Batch, Kind, StepGraphs, fill_in
from radixkv.engine.support import SUPPORTED
from radixkv.errors import UnsupportedModel
from radixkv.store.device import DeviceStore
from radixkv_kernels.backend import can_launch
from radixkv_kernels.planning import Span

__all__ = ["PagedRunner", "PagedWork"]

log = logging.getLogger("radixkv.engine")

_DECODING_ROWS = 128  # graphs without wide work are captured ahead up to here; larger ones where they are needed

_SAMPLE_ROWS = (67, 1)
"""Layers are compiled for one row, and for several: so many that no other length of a model is like it, as equal lengths
are taken to stay equal, and the code would fit no other number of rows."""


@dataclass(frozen=True, slots=True)
class PagedWork:
    """One request's part of a forward pass.

    Attributes:
        tokens: [n] its next tokens; where `source` >= 0 the first is not known here, and ignored.
        position: tokens before them, whose KV is in its pages.
        pages: ids of the pages of its tokens [0, position + n), in order; may go on beyond.
        wants_logits: whether the last one's logits are needed.
        source: which of an earlier step's tokens the first one is; -1 if it is known.
    """

    tokens: npt.NDArray[np.int32]
    position: int
    pages: npt.NDArray[np.int32]
    wants_logits: bool
    source: int = -1


class PagedRunner:
    """Runs a transformers model whose attention reads and writes the page store.

    Mutates: the model: its attention. One runner a model.

    Args:
        model: in eval mode, on `device`.
        store: the pages; attention is theirs in place.
        device: of both.
        graphs: replay small steps as CUDA graphs (on a CPU: pad them alike, and run them without).
        compile: let `warm_up` compile the decoder layers.

    Raises:
        UnsupportedModel: a layer keeps its KV elsewhere.
    """

    __slots__ = ("_base", "_closed", "_compile", "_eager", "_geometry", "_graphs", "_hidden", "_lock", "_warming",
                 "device", "model", "num_layers", "store", "vocab_size")  # fmt: skip

    def __init__(
        self,
        model: PreTrainedModel,
        store: DeviceStore,
        device: torch.device,
        *,
        graphs: bool,
        compile: bool,  # noqa: A002
    ) -> None:
        self.model, self.store, self.device = model, store, device
        text_config = model.config.get_text_config()
        self.vocab_size = int(text_config.vocab_size)
        self.num_layers = int(text_config.num_hidden_layers)
        self._compile = compile
        self._lock = threading.RLock()  # a step, or a capture
        self._warming = self._closed = False
        self._hidden: torch.Tensor | None = None
        model.set_attn_implementation(PAGED_ATTENTION)
        attach_store(model, store)
        runs = can_launch(store.kv)
        if not runs:
            lacks = "Triton is not installed" if device.type == "cuda" else "this is a CPU"
            log.warning("attention over pages runs in plain PyTorch, many times slower: %s", lacks)
        self._base: Any = model.base_model
        self._eager: Callable[..., Any] = self._base.forward
        self._geometry = geometry_of(model, store) if runs or device.type == "cpu" else None
        windows = self._look()
        self._graphs = self._make_graphs(windows) if graphs else None

    @torch.inference_mode()
    def forward(self, works: Sequence[PagedWork], previous: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the works' KV into their pages.

        Cost: one pass over the weights, and attention over each work's context. On a GPU it is put in line, not waited for.

        Args:
            works: of distinct requests; the slots of their new tokens are nobody else's.
            previous: [k] int64 on the device: tokens of an earlier step, for works with a source.

        Returns:
            [m, V] logits of the last token of each work that wants them, in order.
        """
        batch = _batch(works, self.store.shape.page_size)
        with self._lock:
            graphed = self._graphs.run(batch, previous) if self._graphs is not None and not self._warming else None
            if graphed is not None:
                return self._head(*graphed, batch.num_logits)
            inputs = _upload(batch.inputs, self.device)
            fill_in(inputs, batch, previous)
            with attending(PagedStep(inputs[2], batch.spans, self._geometry)):
                return self._call(inputs, batch.num_logits)

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Compile the layers, then capture every graph, largest first. May run beside `forward`, in a thread of its own.

        Cost: seconds to minutes. While layers are compiled steps run kernel by kernel; while a graph is captured they wait.

        Args:
            progress: called with ("compile" or "graphs", done, in all).
        """
        layers = decoder_layers(self.model, self.num_layers)
        if self._compile:
            self._warming = True  # no capture while a compiler tries kernels on the device
            try:
                _tell(progress, "compile", 0, 1)
                if compile_layers(self._samples(layers)):
                    self._switch(layers)
            finally:
                self._warming = False
            _tell(progress, "compile", 1, 1)
        if self._graphs is None:
            return
        sizes = sorted(self._graphs.buckets, reverse=True)
        kinds = [Kind(rows, narrow=True, wide=True) for rows in sizes]
        kinds += [Kind(rows, narrow=False, wide=True) for rows in sizes]  # prompts only
        kinds += [Kind(rows, narrow=True, wide=False) for rows in sizes if rows <= _DECODING_ROWS]
        for done, kind in enumerate(kinds):
            _tell(progress, "graphs", done, len(kinds))
            with self._lock:
                if self._graphs is None or not self._graphs.capture(kind):  # None: closed meanwhile
                    break
        _tell(progress, "graphs", len(kinds), len(kinds))

    def close(self) -> None:
        """Let go of the page store and the graphs, so that their memory can be given back; another may take the model."""
        with self._lock:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # under the lock: not while a graph is captured
            if self._graphs is not None:
                self._graphs.drop()
            self._graphs, self._closed = None, True
            detach_store(self.model)
            use_original(decoder_layers(self.model, self.num_layers))
            vars(self._base).pop("forward", None)

    def _samples(self, layers: Sequence[torch.nn.Module]) -> list[LayerCall]:
        """How the layers are called, to compile them for."""
        with self._lock:
            return [call for rows in _SAMPLE_ROWS for call in layer_calls(layers, partial(self._dry_run, rows))]

    def _switch(self, layers: Sequence[torch.nn.Module]) -> None:
        with self._lock:
            if self._closed:
                return
            use_compiled(layers)
            if self._graphs is not None:
                self._graphs.drop()

    def _make_graphs(self, windows: set[int]) -> StepGraphs | None:
        if self._geometry is None or self._base is self.model:
            log.warning("no CUDA graphs: %s", "they need the kernels" if self._geometry is None else "the model has no body")
            return None
        self._base.forward = self._layers  # so that the model's own head follows a graph, whatever it does to the logits
        max_pages = 2 * self.store.num_pages  # more only where pages are shared by ever so little
        return StepGraphs(self._body, self._geometry, sorted(windows), self.device, max_pages, BUCKETS)

    def _layers(self, *args: Any, **kwargs: Any) -> Any:
        """The model's layers, or what a graph has made of them."""
        if self._hidden is None:
            return self._eager(*args, **kwargs)
        return MoeModelOutputWithPast(last_hidden_state=self._hidden)  # has a field for whatever a head looks at

    def _body(self, inputs: torch.Tensor, _: PagedStep) -> torch.Tensor:
        hidden: torch.Tensor = self._eager(
            input_ids=inputs[0][None], position_ids=inputs[1][None], attention_mask=None, use_cache=False
        )[0]
        return hidden

    def _head(self, inputs: torch.Tensor, hidden: torch.Tensor, num_logits: int) -> torch.Tensor:
        self._hidden = hidden
        try:
            return self._call(inputs, num_logits)
        finally:
            self._hidden = None

    def _call(self, inputs: torch.Tensor, num_logits: int) -> torch.Tensor:
        """The whole model on inputs [ROW_KINDS, N]; logits of the rows that are listed there."""
        output = self.model(
            input_ids=inputs[0][None],
            position_ids=inputs[1][None],
            attention_mask=None,
            use_cache=False,
            logits_to_keep=inputs[3, :num_logits],
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _dry_run(self, num_rows: int) -> DryStep:
        """Run the model as it stands on so many rows, and touch no page."""
        inputs = torch.zeros((ROW_KINDS, num_rows), dtype=torch.int64, device=self.device)
        inputs[1] = torch.arange(num_rows, device=self.device)
        step = DryStep()
        with self._lock, attending(step):
            self._call(inputs, 1)
        return step

    @torch.inference_mode()
    def _look(self) -> set[int]:
        """The windows of the layers' attention; checks that all of them attend through us."""
        step = self._dry_run(2)
        if step.num_layers != self.num_layers:
            reason = f"{type(self.model).__name__}, of whose {self.num_layers} layers {step.num_layers} attend through us"
            raise UnsupportedModel(type(self.model).__name__, reason, SUPPORTED)
        return step.windows


def _batch(works: Sequence[PagedWork], page_size: int) -> Batch:
    """A step's inputs: [ROW_KINDS, n], see `Batch`. Cost: a few microseconds a work."""
    counts = np.array([len(work.tokens) for work in works])
    ends = np.cumsum(counts)
    inputs = np.zeros((ROW_KINDS, int(ends[-1])), np.int64)
    inputs[0] = np.concatenate([work.tokens for work in works])
    inputs[1] = np.arange(inputs.shape[1]) + np.repeat([work.position for work in works] - (ends - counts), counts)
    first = 0
    for work, end in zip(works, ends.tolist(), strict=True):
        inputs[2, first:end] = work.pages[inputs[1, first:end] // page_size]
        first = end
    inputs[2] = inputs[2] * page_size + inputs[1] % page_size
    rows = ends[[work.wants_logits for work in works]] - 1
    sources = np.array([work.source for work in works])
    filled = np.flatnonzero(sources >= 0)
    inputs[3, : len(rows)] = rows
    inputs[4, : len(filled)], inputs[5, : len(filled)] = (ends - counts)[filled], sources[filled]
    inputs[0, (ends - counts)[filled]] = 0  # whatever stands there, the embedding must not be asked for it
    spans = tuple(Span(work.pages, work.position, len(work.tokens)) for work in works)
    return Batch(spans, inputs, len(rows), len(filled))


def _upload(array: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _tell(progress: Callable[[str, int, int], None] | None, stage: str, done: int, total: int) -> None:
    if progress is not None:
        progress(stage, done, total)
