"""FlashInfer beside us, where it is installed: paged decode and prefill, and its cascade over levels of a tree.

Its settings are the ones its documentation recommends for grouped queries: tensor cores on, the backend its own choice, a
workspace zeroed once. Like ours it is planned outside the timing. It compiles its kernels at their first use, for minutes.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bench.kernels.cases import Inputs
from bench.kernels.contestants import Contestant

__all__ = ["available", "flashinfer_ways"]

_WORKSPACE_BYTES = 512 << 20


def available() -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec("flashinfer") is not None


def flashinfer_ways(inputs: Inputs) -> Iterator[Contestant]:
    """Its ways to compute a case: one for flat batches, two where requests share pages.

    Raises:
        ImportError: it is not installed.
    """
    library = importlib.import_module("flashinfer")
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.kv.device)
    yield _decode(library, inputs, workspace) if inputs.case.new == 1 else _prefill(library, inputs, workspace)
    if inputs.case.shares and inputs.case.new == 1:
        yield _cascade(library, inputs, torch.zeros_like(workspace))


def _decode(library: Any, inputs: Inputs, workspace: torch.Tensor) -> Contestant:
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    dtype = inputs.shape.dtype
    wrapper.plan(
        *_page_tables(inputs), *_heads(inputs), inputs.shape.page_size,
        q_data_type=dtype, kv_data_type=dtype, sm_scale=inputs.scale,
    )  # fmt: skip
    return Contestant("flashinfer", lambda k: wrapper.run(inputs.query[k], inputs.kv[:, k], out=inputs.out))


def _prefill(library: Any, inputs: Inputs, workspace: torch.Tensor) -> Contestant:
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    rows = np.arange(inputs.case.num_requests + 1) * inputs.case.new
    dtype = inputs.shape.dtype
    wrapper.plan(
        _ints(inputs, rows), *_page_tables(inputs), *_heads(inputs), inputs.shape.page_size,
        causal=True, q_data_type=dtype, kv_data_type=dtype, sm_scale=inputs.scale,
    )  # fmt: skip
    return Contestant("flashinfer", lambda k: wrapper.run(inputs.query[k], inputs.kv[:, k], out=inputs.out))


def _cascade(library: Any, inputs: Inputs, workspace: torch.Tensor) -> Contestant:
    case, page_size = inputs.case, inputs.shape.page_size
    wrapper = library.MultiLevelCascadeAttentionWrapper(len(case.levels), workspace, "NHD")
    rows, begins, pages, last = [], [], [], []
    for level, ((count, tokens), nodes) in enumerate(zip(case.levels, inputs.nodes, strict=True)):
        of = [inputs.node_of(level, request) for request in range(case.num_requests)]
        rows.append(_ints(inputs, np.searchsorted(of, np.arange(count + 1))))
        begins.append(_ints(inputs, np.arange(count + 1) * nodes.shape[1]))
        pages.append(_ints(inputs, nodes.ravel()))
        last.append(_ints(inputs, np.full(count, (tokens - 1) % page_size + 1)))
    dtype = inputs.shape.dtype
    wrapper.plan(
        rows, begins, pages, last, *_heads(inputs), page_size,
        causal=False, sm_scale=inputs.scale, q_data_type=dtype, kv_data_type=dtype,
    )  # fmt: skip
    return Contestant("cascade", lambda k: wrapper.run(inputs.query[k], inputs.kv[:, k]))


def _page_tables(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(begins, page ids, tokens in the last page) of all requests."""
    context, page_size = inputs.case.context, inputs.shape.page_size
    begins = np.cumsum([0, *(len(span.pages) for span in inputs.spans)])
    last = np.full(len(inputs.spans), (context - 1) % page_size + 1)
    pages = np.concatenate([span.pages for span in inputs.spans])
    return _ints(inputs, begins), _ints(inputs, pages), _ints(inputs, last)


def _heads(inputs: Inputs) -> tuple[int, int, int]:
    return inputs.shape.num_heads, inputs.shape.num_kv_heads, inputs.shape.head_dim


def _ints(inputs: Inputs, values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32)).to(inputs.kv.device)
