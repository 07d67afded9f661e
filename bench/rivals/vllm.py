"""vLLM's KVCacheManager behind the bench's interface: blocks of 16 tokens, sha256, both its defaults.

A look-up hashes the prompt's blocks, as a request does when it is made, and asks for the computed ones. Their pins are
taken by the allocation call, which is the insert here, with the free after it. vLLM evicts block by block while it
allocates: there is no call to evict alone. A prompt's last token is never a hit.
"""

from __future__ import annotations

from typing import Any

from bench.index.workloads import PAGE
from bench.index.workloads import Request as Prompt
from bench.rivals.stand_ins import install

install()

import torch  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec  # noqa: E402
from vllm.v1.request import Request  # noqa: E402

LONGEST = 2**19
SAMPLING = SamplingParams(max_tokens=1)


class VllmIndex:
    """A `KVCacheManager` for one group of full-attention layers."""

    page_size = PAGE
    exact = False
    keep_last = True
    evicts = True

    def __init__(self, capacity_tokens: int, num_sessions: int, form: str) -> None:
        del num_sessions, form
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(PAGE, sha256)
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=16, dtype=torch.bfloat16)
        config = KVCacheConfig(
            num_blocks=capacity_tokens // PAGE + 1,  # block 0 is never given out
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        self.manager = KVCacheManager(config, max_model_len=LONGEST, scheduler_block_size=PAGE, hash_block_size=PAGE)
        self._made = 0

    def prepare(self, request: Prompt) -> Any:
        """A request whose blocks are not hashed yet."""
        self._made += 1
        return Request(str(self._made), request.prompt.tolist(), SAMPLING, None)

    def lookup(self, given: Any) -> int:
        """Hash the blocks and find the computed ones."""
        given._block_hasher = self._hasher
        given.update_block_hashes()
        self._request = given
        self._blocks, self._num_matched, _ = self.manager.get_computed_blocks(given)
        return int(self._num_matched)

    def compute(self) -> None:
        """Nothing to make ready."""

    def insert(self) -> None:
        """Allocate and cache the blocks, then free the request."""
        request, matched = self._request, self._num_matched
        done = self.manager.allocate_slots(request, request.num_tokens - matched, matched, self._blocks)
        assert done is not None, "no blocks left"
        self.manager.free(request)
        del self._request, self._blocks

    def num_cached(self) -> int:
        """Tokens of the blocks that a hash names."""
        return len(self.manager.block_pool.cached_block_hash_to_block) * PAGE

    def check(self) -> None:
        """Every block is free again."""
        pool = self.manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
