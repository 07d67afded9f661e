"""Small traces for tests, and the obvious ways to compute what the library computes cleverly."""

from __future__ import annotations

import gzip
import json
import random
from functools import cache
from pathlib import Path

import numpy as np

from radixkv.replay.trace import TraceRequest

DATA = Path(__file__).parent.parent / "data/traces"


def write(path: Path, lines, packed=False) -> Path:
    """One line for each of `lines`: text as it is, anything else as JSON."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


def mooncake(ids, time_ms=0, tokens=None, **more):
    length = len(ids) * 512 if tokens is None else tokens
    return {"timestamp": time_ms, "input_length": length, "output_length": 5, "hash_ids": ids, **more}


def qwen(chat, ids, parent=-1, time_s=0.0, **more):
    return {
        "chat_id": chat,
        "parent_chat_id": parent,
        "timestamp": time_s,
        "input_length": len(ids) * 16,
        "output_length": 3,
        "type": "text",
        "turn": 1,
        "hash_ids": ids,
        **more,
    }


HEADER = {
    "format": "triedelta-1",
    "block_tokens": 512,
    "fields": ["timestamp_ms", "input_length", "output_length", "parent_request", "shared_blocks", "new_blocks"],
}


def random_paths(seed, num_requests=40, depth=6, fan_out=3):
    """Requests over a random trie: ids that include their prefix, beginnings that are reused and extended."""
    chance = random.Random(seed)
    nodes: dict[tuple[int, ...], int] = {}
    paths: list[list[int]] = []
    for _ in range(num_requests):
        keys = [chance.randrange(fan_out) for _ in range(chance.randrange(depth + 1))]
        paths.append([nodes.setdefault(tuple(keys[: end + 1]), len(nodes)) for end in range(len(keys))])
    return paths


def requests_of(paths, block_tokens=4):
    return [
        TraceRequest(float(i), len(path) * block_tokens + i % block_tokens, 1, np.array(path, np.int32), block_tokens)
        for i, path in enumerate(paths)
    ]


def lru_by_hand(paths, capacity):
    """Hits of a list of pages, the least recently used last; a request's deeper pages are older."""
    recent: list[int] = []
    hits = 0
    for whole in paths:
        path = whole[:capacity]
        cached = 0
        while cached < len(path) and path[cached] in recent:
            cached += 1
        hits += cached
        recent = (path + [page for page in recent if page not in path])[:capacity]
    return hits


def best_by_search(paths, capacity):
    """The most hits any leaf-only eviction can reach: every choice is tried."""
    parent = {page: path[i - 1] if i else None for path in paths for i, page in enumerate(path)}

    @cache
    def best(number, resident):
        if number == len(paths):
            return 0
        path = paths[number][:capacity]
        cached = 0
        while cached < len(path) and path[cached] in resident:
            cached += 1
        return cached + max(best(number + 1, after) for after in shrunk(frozenset(path) | resident, frozenset(path)))

    @cache
    def shrunk(pages, pinned):
        if len(pages) <= capacity:
            return frozenset([pages])
        inner = {parent[page] for page in pages}
        leaves = [page for page in pages if page not in inner and page not in pinned]
        return frozenset().union(*(shrunk(pages - {leaf}, pinned) for leaf in leaves))

    return best(0, frozenset())
