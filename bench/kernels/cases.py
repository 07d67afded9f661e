"""What the attention benchmark asks: batches of Llama-3.1-8B's shape, and the tree of pages behind each.

A case is levels of a tree, from the system prompt down to what each request has for itself:

    levels ((1, 1024), (8, 4096), (64, 256))     one node of 1024 tokens, in 8 requests' worth of branches of 4096, ...
    64 requests                                  request i goes through node i * 8 // 64 of the second level

The last level has a node for each request; the new tokens stand at its end, so a context counts them too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from radixkv_kernels.planning import Geometry, Span

__all__ = ["CASES", "LLAMA", "TOY", "TOY_CASES", "Case", "Inputs", "Shape"]

_POOL_BYTES = 24e9  # of all layers of a case; a real pool's stride between pages comes from its many layers
_SPARE = 1.25  # pages of the pool for each one in use: ids are scattered among them


@dataclass(frozen=True, slots=True)
class Shape:
    """Of attention, and of the pool: as many layers as the model has, where the memory suffices."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_layers: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


LLAMA = Shape(num_heads=32, num_kv_heads=8, head_dim=128, page_size=16, num_layers=32, dtype=torch.bfloat16)
TOY = Shape(num_heads=4, num_kv_heads=1, head_dim=64, page_size=16, num_layers=2, dtype=torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Case:
    """A batch of requests. `target_ms` is what we mean to reach on an H100; None where only grouping is judged."""

    name: str
    levels: tuple[tuple[int, int], ...]
    new: int = 1
    target_ms: float | None = None

    @property
    def num_requests(self) -> int:
        """Requests."""
        return self.levels[-1][0]

    @property
    def context(self) -> int:
        """Tokens of one request, the new ones included."""
        return sum(tokens for _, tokens in self.levels)

    @property
    def shares(self) -> bool:
        """Whether requests have pages in common."""
        return len(self.levels) > 1

    def kv_bytes(self, shape: Shape) -> int:
        """Bytes of keys and values that must be read, shared ones once."""
        return sum(nodes * tokens for nodes, tokens in self.levels) * shape.token_bytes

    def flops(self, shape: Shape) -> float:
        """Operations of both products, what causality hides left out."""
        seen = self.context - (self.new - 1) / 2
        return 4.0 * self.num_requests * self.new * seen * shape.num_heads * shape.head_dim


def _flat(requests: int, context: int) -> tuple[tuple[int, int], ...]:
    return ((requests, context),)


CASES = (
    Case("decode 1 x 4096", _flat(1, 4096), target_ms=0.020),
    Case("decode 1 x 32768", _flat(1, 32768), target_ms=0.060),
    Case("decode 16 x 4096", _flat(16, 4096), target_ms=0.105),
    Case("decode 64 x 4096", _flat(64, 4096), target_ms=0.372),
    Case("decode 64 x 16384", _flat(64, 16384), target_ms=1.43),
    Case("decode 128 x 1024", _flat(128, 1024), target_ms=0.195),
    Case("prefill 4096", _flat(1, 4096), new=4096, target_ms=0.28),
    Case("prefill 512 on a cached 32768", _flat(1, 32768), new=512, target_ms=0.50),
    Case("prefill 32768", _flat(1, 32768), new=32768, target_ms=15.8),
    Case("prefill 8 x 256 on 8192", _flat(8, 8192), new=256, target_ms=0.52),
    Case("prefill 32 x 128 on 4096", _flat(32, 4096), new=128, target_ms=0.57),
    Case("decode 64, 16384 shared + 512 own", ((1, 16384), (64, 512)), target_ms=0.13),
    Case("decode 64, 0 shared + 2048 own", _flat(64, 2048)),
    Case("decode 64, 128 shared + 2048 own", ((1, 128), (64, 2048))),
    Case("decode 64, 512 shared + 2048 own", ((1, 512), (64, 2048))),
    Case("decode 64, 2048 shared + 2048 own", ((1, 2048), (64, 2048))),
    Case("decode 2, 4096 shared + 256 own", ((1, 4096), (2, 256))),
    Case("decode 64, 1024 shared, 8 x 4096, 256 own", ((1, 1024), (8, 4096), (64, 256))),
)
"""The table of targets, and beside it what shows that grouping never loses to reading every request's pages alone."""

TOY_CASES = (
    Case("decode 1 x 96", _flat(1, 96)),
    Case("prefill 20 on 48", _flat(1, 48), new=20),
    Case("prefill 32", _flat(1, 32), new=32),
    Case("decode 3, 384 shared + 16 own", ((1, 384), (3, 16)), target_ms=1.0),
    Case("decode 4, 16 shared, 2 x 320, 16 own", ((1, 16), (2, 320), (4, 16))),
)


class Inputs:
    """Fresh random tensors of a case: a pool of scattered pages whose unused pages are NaN, and queries for each layer.

    Attributes:
        case, shape: what it is for.
        nodes: per level [nodes, pages of a node] page ids.
        spans: one for each request.
        kv: [P, L, 2, S, H, D].
        query: [cycle, N, Hq, D].
        out: [N, Hq, D].
    """

    def __init__(self, case: Case, shape: Shape, cycle: int, device: torch.device, seed: int) -> None:
        self.case, self.shape, self.cycle = case, shape, cycle
        rng = np.random.default_rng(seed)
        per_node = [-(-tokens // shape.page_size) for _, tokens in case.levels]
        in_use = sum(nodes * pages for (nodes, _), pages in zip(case.levels, per_node, strict=True))
        num_pages = int(in_use * _SPARE) + 1
        ids = rng.permutation(num_pages)[:in_use].astype(np.int32)
        self.nodes: list[np.ndarray] = []
        for (nodes, _), pages in zip(case.levels, per_node, strict=True):
            self.nodes.append(ids[: nodes * pages].reshape(nodes, pages))
            ids = ids[nodes * pages :]
        self.spans = [Span(self._pages(i), case.context - case.new, case.new) for i in range(case.num_requests)]
        self.kv = self._pool(num_pages, device, seed)
        rows = (cycle, case.num_requests * case.new, shape.num_heads, shape.head_dim)
        self.query = torch.randn(rows, dtype=shape.dtype, device=device)
        self.out = torch.empty(rows[1:], dtype=shape.dtype, device=device)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.shape.head_dim**-0.5)

    def geometry(self, num_processors: int) -> Geometry:
        """What a plan needs to know of the shape."""
        shape = self.shape
        return Geometry(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.page_size, num_processors=num_processors)

    def node_of(self, level: int, request: int) -> int:
        """Which node of a level a request goes through."""
        return request * self.case.levels[level][0] // self.case.num_requests

    def contiguous(self, layer: int) -> torch.Tensor:
        """[B, 2, H, C, D] the keys and values of every request, copied out of the pages."""
        pages = torch.from_numpy(np.stack([span.pages for span in self.spans])).long().to(self.kv.device)
        return self.kv[pages, layer].permute(0, 2, 4, 1, 3, 5).flatten(3, 4)[:, :, :, : self.case.context].contiguous()

    def _pages(self, request: int) -> np.ndarray:
        return np.concatenate([nodes[self.node_of(level, request)] for level, nodes in enumerate(self.nodes)])

    def _pool(self, num_pages: int, device: torch.device, seed: int) -> torch.Tensor:
        shape = self.shape
        page_bytes = shape.token_bytes * shape.page_size
        num_layers = max(min(shape.num_layers, int(_POOL_BYTES // (num_pages * page_bytes))), self.cycle)
        size = (num_pages, num_layers, 2, shape.page_size, shape.num_kv_heads, shape.head_dim)
        torch.manual_seed(seed)
        kv = torch.empty(size, dtype=shape.dtype, device=device).normal_()
        unused = np.ones(num_pages, bool)
        for nodes in self.nodes:
            unused[nodes.ravel()] = False
        kv[torch.from_numpy(np.flatnonzero(unused)).to(device)] = float("nan")
        return kv
