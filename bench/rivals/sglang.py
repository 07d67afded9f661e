"""SGLang's radix trees behind the bench's interface, page size 1 as by default.

`python` is its plain radix tree in Python, `rust` the default since the tree was rewritten: one node id a lock, the
walk in Rust. Tokens are given as SGLang's scheduler holds them, an array of 64-bit integers. Slots come from its own
allocator through its own allocation call, which evicts where too few are free; a request's row of slots is kept as in
its request pool.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from bench.index.workloads import Request
from bench.rivals.stand_ins import install

install()

import torch  # noqa: E402
from sglang.srt.mem_cache.allocation import alloc_token_slots  # noqa: E402
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams  # noqa: E402
from sglang.srt.mem_cache.cache_init_params import CacheInitParams  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey  # noqa: E402

LONGEST = 2**19  # tokens of a request's row of slots
ROW = torch.ones(LONGEST, dtype=torch.int32)  # the request pool's: not the tree's memory
torch.set_num_threads(1)


class SglangIndex:
    """One of SGLang's trees over its own slot allocator."""

    page_size = 1
    exact = True
    keep_last = False
    evicts = True

    def __init__(self, capacity_tokens: int, num_sessions: int, form: str) -> None:
        del num_sessions
        self._allocator = TokenToKVPoolAllocator(capacity_tokens, torch.bfloat16, "cpu", None, need_sort=False)
        params = CacheInitParams(
            disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=self._allocator, page_size=1
        )
        self.cache = _unified(params) if form == "rust" else RadixCache(params)

    def prepare(self, request: Request) -> array[int]:
        """The scheduler's own form."""
        return array("q", request.prompt.astype(np.int64).tobytes())

    def lookup(self, given: array[int]) -> int:
        """Make the key, match, lock."""
        self._key = RadixKey(given)
        found = self.cache.match_prefix(MatchPrefixParams(key=self._key))
        self._lock = self.cache.lock(found.last_device_node)
        self._num_matched: int = found.device_prefix_len
        return self._num_matched

    def compute(self) -> None:
        """Take a copy of the row of slots, as a checkpoint does."""
        self._values = ROW[: len(self._key)].to(torch.int64, copy=True)

    def insert(self) -> None:
        """Allocate slots for what is not cached, insert, unlock."""
        num_tokens, matched = len(self._key), self._num_matched
        if num_tokens > matched:
            self._values[matched:] = alloc_token_slots(self.cache, num_tokens - matched)
        self.cache.insert(InsertParams(key=self._key, value=self._values, prev_prefix_len=matched))
        self.cache.unlock(self._lock)
        del self._key, self._lock, self._values

    def evict(self, num_tokens: int) -> int:
        """Evict."""
        return int(self.cache.evict(EvictParams(num_tokens=num_tokens)).num_tokens_evicted)

    def num_cached(self) -> int:
        """Tokens in the tree."""
        return int(self.cache.evictable_size() + self.cache.protected_size())

    def check(self) -> None:
        """Slots are in the tree or free."""
        total = self.num_cached() + self._allocator.available_size()
        assert total == self._allocator.size, f"{total} of {self._allocator.size} slots accounted for"


def _unified(params: CacheInitParams) -> Any:
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    params.tree_components = (ComponentType.FULL,)
    params.tree_core_backend = "rust"
    cache = UnifiedRadixCache(params)
    kind = type(cache.tree_core).__name__
    if not kind.startswith("Rust"):
        raise RuntimeError(f"the Rust tree does not load here: SGLang fell back to {kind}")
    return cache
