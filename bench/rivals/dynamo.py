"""Dynamo's KV indexer behind the bench's interface: blocks of 16 tokens.

It is a router's view of what workers cache, told by their events, so it holds neither pages nor pins and never evicts
by itself. A look-up hashes the prompt's blocks and finds them; an insert applies the event that a worker would send.
Writing that event is the worker's work and not timed.
"""

from __future__ import annotations

import json

import xxhash
from dynamo.llm import RadixTree, compute_block_hash_for_seq

from bench.index.workloads import PAGE, Request


class DynamoIndex:
    """A `RadixTree` fed by one worker."""

    page_size = PAGE
    exact = False
    keep_last = False
    evicts = False

    def __init__(self, capacity_tokens: int, num_sessions: int, form: str) -> None:
        del capacity_tokens, num_sessions, form
        self._tree = RadixTree()
        self._num_blocks = self._events = 0

    def prepare(self, request: Request) -> list[int]:
        """A list, which its hash function takes."""
        return request.prompt.tolist()

    def lookup(self, given: list[int]) -> int:
        """Hash the blocks and find them."""
        self._hashes = compute_block_hash_for_seq(given, PAGE)
        self._num_matched = max(self._tree.find_matches(self._hashes).scores.values(), default=0)
        return self._num_matched * PAGE

    def compute(self) -> None:
        """Write the worker's event: blocks are named by a hash of their whole prefix."""
        names, name = [], 0
        for block in self._hashes:
            name = xxhash.xxh64_intdigest(block.to_bytes(8, "little"), name)
            names.append(name)
        first = self._num_matched
        new = zip(names[first:], self._hashes[first:], strict=True)
        blocks = [{"block_hash": name, "tokens_hash": tokens} for name, tokens in new]
        self._new = len(blocks)
        stored = {"parent_hash": names[first - 1] if first else None, "blocks": blocks}
        self._event = json.dumps({"event_id": self._events, "data": {"stored": stored}}).encode()
        self._events += 1

    def insert(self) -> None:
        """Apply it."""
        if self._new:
            self._tree.apply_event(0, self._event)
            self._num_blocks += self._new

    def num_cached(self) -> int:
        """Tokens of the blocks that were stored."""
        return self._num_blocks * PAGE

    def check(self) -> None:
        """Nothing to check."""
