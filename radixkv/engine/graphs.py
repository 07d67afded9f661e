"""Steps of few rows as CUDA graphs: everything between the embedding and the last norm is one launch.

A launch a kernel costs more than the kernels of a small step do, so a step of up to 512 rows is padded up to the next
bucket and replayed. Its inputs lie where the graph was captured to look for them, in one buffer that one copy fills:

    │ ids │ positions │ slots │ logit rows │ filled rows │ their sources │ plan │ plan of another window ...
      6 x N int64, N the bucket's rows                                     int32, as long as it needs

Padding has slot -1 and no work: it writes nothing, and what it computes nobody reads. Buckets share one pool of memory and
the buffer, as one step runs after the other. The head stays outside, for the rows that want logits only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from radixkv.engine.cuda import PagedStep, attending, narrowed
from radixkv_kernels.device_plan import Capacity, DevicePlan, PlanTooLarge, pack, partial_results
from radixkv_kernels.planning import Geometry, Plan, Span, plan

__all__ = ["BUCKETS", "ROW_KINDS", "Batch", "Body", "Kind", "StepGraphs", "fill_in"]

log = logging.getLogger("radixkv.engine")

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Rows of the graphs."""

ROW_KINDS = 6
"""Rows of a step's int64 inputs: ids, positions, slots, rows that want logits, rows to fill in, where from."""

_INTS = 2 * ROW_KINDS  # int32 that the inputs of one row take


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's inputs on the host.

    Attributes:
        spans: of the requests.
        inputs: [ROW_KINDS, n] int64.
        num_logits, num_filled: how many of the last three rows' entries are used.
    """

    spans: tuple[Span, ...]
    inputs: npt.NDArray[np.int64]
    num_logits: int
    num_filled: int

    @property
    def num_rows(self) -> int:
        """New tokens: n."""
        return self.inputs.shape[1]


Body = Callable[[torch.Tensor, PagedStep], torch.Tensor]
"""Runs the model's layers: inputs [ROW_KINDS, N] on the device, and the step, to hidden states [1, N, width]."""


class Kind(NamedTuple):
    """What a graph has room for. Not to launch the kernel of a width that has no work saves a few microseconds a layer.

    Attributes:
        rows: of a bucket.
        narrow, wide: whether there are work items of that width.
    """

    rows: int
    narrow: bool
    wide: bool


@dataclass(slots=True)
class _Bucket:
    """One graph, and its inputs: views of the shared buffer."""

    inputs: torch.Tensor
    step: PagedStep
    plans: dict[int, tuple[int, DevicePlan]]  # by window: where in the buffer, and the arrays there
    num_ints: int
    graph: torch.cuda.CUDAGraph | None = None
    hidden: torch.Tensor | None = None


@dataclass(slots=True)
class StepGraphs:
    """The graphs of one model, made as they are needed. On a CPU steps are padded all the same, and run without graphs.

    Not thread-safe: one step, or one capture, at a time.

    Attributes:
        body: what is captured.
        geometry: of the kernels' plans.
        windows: of the model's layers; 0 for none.
        device: where it runs.
        max_pages: page ids that a plan has room for; of the room only what is used is copied.
        buckets: rows of the graphs, ascending.
    """

    body: Body
    geometry: Geometry
    windows: Sequence[int]
    device: torch.device
    max_pages: int
    buckets: tuple[int, ...] = BUCKETS
    _ready: dict[Kind, _Bucket] = field(default_factory=dict)
    _buffer: torch.Tensor | None = None
    _scratch: tuple[torch.Tensor, torch.Tensor] | None = None
    _pool: Any = None
    _failed: bool = False

    def run(self, batch: Batch, previous: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Run a step's layers; nothing is waited for.

        Cost: one copy to the device and one launch; the first step of a bucket captures it, which takes longer.

        Returns:
            Its inputs on the device, and [1, N, width] hidden states, both good until the next step; None where no graph
            fits this step.
        """
        rows = next((size for size in self.buckets if size >= batch.num_rows), None)
        if rows is None:
            return None
        works = self._plan(batch.spans)
        kind = Kind(rows, *(any(len(getattr(work, width)) for work in works.values()) for width in ("narrow", "wide")))
        if not self.capture(kind):
            return None
        bucket = self._ready[kind]
        try:
            self._send(bucket, batch, works)
        except PlanTooLarge as error:
            log.debug("a step runs without its graph: %s", error)
            return None
        fill_in(bucket.inputs, batch, previous)
        if bucket.graph is None:
            bucket.hidden = self._run_body(bucket)
        else:
            bucket.graph.replay()
        assert bucket.hidden is not None
        return bucket.inputs, bucket.hidden

    def _plan(self, spans: Sequence[Span]) -> dict[int, Plan]:
        """The attention of a step, by window."""
        return {window: plan(spans, self.geometry, window=narrowed(window, spans)) for window in self.windows}

    def capture(self, kind: Kind) -> bool:
        """Make sure that there is a graph of a kind; False where the model cannot be captured."""
        if self._failed or kind in self._ready:
            return not self._failed
        self._wait()  # for a step that may be reading the shared buffer, on whatever stream
        bucket = self._lay_out(kind)
        self._send(bucket, Batch((), np.empty((ROW_KINDS, 0), np.int64), 0, 0), self._plan(()))
        if self.device.type == "cuda":
            try:
                self._record(bucket)
            except Exception as error:  # whatever the model does that a graph cannot hold: it runs without
                self._failed = True
                self.drop()
                reason = (str(error) or type(error).__name__).splitlines()[0]
                log.warning("no CUDA graphs, every step is launched kernel by kernel: %s", reason)
                return False
        self._ready[kind] = bucket
        return True

    def drop(self) -> None:
        """Forget all graphs, as after the model's layers have changed. Waits for the device, which may be running one."""
        self._wait()
        self._ready.clear()
        self._pool = None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _record(self, bucket: _Bucket) -> None:
        """Capture a bucket, whose inputs are padding only."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and libraries make their workspaces now, not under capture
                self._run_body(bucket)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        bucket.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(bucket.graph, pool=self._pool, capture_error_mode="thread_local"):
            bucket.hidden = self._run_body(bucket)
        self._wait()

    def _run_body(self, bucket: _Bucket) -> torch.Tensor:
        with attending(bucket.step):
            return self.body(bucket.inputs, bucket.step)

    def _lay_out(self, kind: Kind) -> _Bucket:
        """Place a bucket's inputs in the shared buffer."""
        buffer, scratch = self._shared()
        rows = kind.rows
        most = Capacity.for_rows(rows, self.geometry, self.max_pages)
        num_narrow, num_wide = most.num_narrow if kind.narrow else 0, most.num_wide if kind.wide else 0
        capacity = replace(most, num_narrow=num_narrow, num_wide=num_wide)
        inputs = buffer[: _INTS * rows].view(torch.int64).view(ROW_KINDS, rows)
        plans, start = {}, _INTS * rows
        for window in self.windows:
            part = buffer[start : start + capacity.num_ints]
            plans[window] = (start, DevicePlan.over(part, capacity, self.geometry, scratch))
            start += capacity.num_ints
        step = PagedStep(inputs[2], (), self.geometry, {window: ready for window, (_, ready) in plans.items()})
        return _Bucket(inputs, step, plans, start)

    def _shared(self) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The buffer and the partial results, large enough for the largest bucket."""
        if self._buffer is None or self._scratch is None:
            largest = Capacity.for_rows(self.buckets[-1], self.geometry, self.max_pages)
            size = _INTS * self.buckets[-1] + len(self.windows) * largest.num_ints
            self._buffer = torch.zeros(size, dtype=torch.int32, device=self.device)
            self._scratch = partial_results(largest.num_slots, self.geometry, self.device)
        return self._buffer, self._scratch

    def _send(self, bucket: _Bucket, batch: Batch, works: Mapping[int, Plan]) -> None:
        """Write a step's inputs and plans, and start their copy to the device.

        The host's side is new for each step, from torch's pinned memory, which is used again once its copy is done: the
        next step is written while this one's is under way.
        """
        assert self._buffer is not None
        rows = bucket.inputs.shape[1]
        host = torch.empty(bucket.num_ints, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        flat = host.numpy()
        inputs = flat[: _INTS * rows].view(np.int64).reshape(ROW_KINDS, rows)
        inputs[:, : batch.num_rows] = batch.inputs
        inputs[:, batch.num_rows :] = 0
        inputs[2, batch.num_rows :] = -1
        copies: list[tuple[int, int]] = []
        for window, (start, ready) in bucket.plans.items():
            used = pack(works[window], ready.capacity, flat[start : start + ready.capacity.num_ints])
            copies.append((start if copies else 0, start + used))  # the inputs travel with the first plan
        for start, stop in copies:
            self._buffer[start:stop].copy_(host[start:stop], non_blocking=True)
        for _, ready in bucket.plans.values():
            ready.spans = batch.spans


def fill_in(inputs: torch.Tensor, batch: Batch, previous: torch.Tensor | None) -> None:
    """Put tokens of an earlier step, which only the device knows, among a step's ids.

    Args:
        inputs: [ROW_KINDS, N] int64 on the device.
        batch: says how many.
        previous: [k] int64 on the device.
    """
    if not batch.num_filled:
        return
    assert previous is not None
    rows, sources = inputs[4, : batch.num_filled], inputs[5, : batch.num_filled]
    inputs[0].index_copy_(0, rows, previous.index_select(0, sources))
