"""Index alone: 200 chat sessions of 20 turns over 512 shared tokens. `python -m bench.index.sessions`.

    lookup   acquire: longest match and lock
    insert   extend, commit and release: pages reserved, the whole prompt published
    cursor   the same with a resumable handle, which sees the new tokens only
    ceiling  one memcmp of the whole prompt, and one copy of it

Tokens are held as buffers (`Tokens`); "list" rows convert a list[int] first. Events are on.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from bench.common import percentiles, save, table
from radixkv import PrefixCache, Tokens
from radixkv.events import Event

SESSIONS, TURNS, SHARED, PAGE = 200, 20, 512, 16


def conversations(seed: int) -> list[list[np.ndarray]]:
    """[session][turn] new token ids; the first turn carries the shared system prompt."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, 50_000, SHARED, dtype=np.int32)
    sessions = []
    for _ in range(SESSIONS):
        turns = [rng.integers(0, 50_000, int(rng.integers(50, 350)), dtype=np.int32) for _ in range(TURNS)]
        sessions.append([np.concatenate([shared, turns[0]]), *turns[1:]])
    return sessions


def run(sessions: list[list[np.ndarray]], form: str) -> dict[str, object]:
    """One pass over all turns, round-robin; times in microseconds."""
    events: list[Event] = []
    cache = PrefixCache(num_pages=200_000, page_size=PAGE, on_event=events.append)
    history = [np.empty(0, np.int32) for _ in sessions]
    cursors = [cache.cursor() for _ in sessions]
    lookup, insert, hits = [], [], 0
    for turn in range(TURNS):
        for index, session in enumerate(sessions):
            history[index] = np.concatenate([history[index], session[turn]])
            prompt = Tokens(history[index])
            given = prompt.tolist() if form == "list" else prompt
            fresh = session[turn].tobytes()
            start = time.perf_counter_ns()
            if form == "cursor":
                cursors[index].append(fresh)
                lease = cache.acquire(cursors[index])
            else:
                lease = cache.acquire(given)
            found = time.perf_counter_ns()
            lease.extend()
            lease.commit()
            lease.release()
            insert.append((time.perf_counter_ns() - found) / 1e3)
            lookup.append((found - start) / 1e3)
            hits += lease.num_matched
        events.clear()
    cache.check()
    look, put = percentiles(lookup), percentiles(insert)
    return {
        "form": form,
        "lookup_us_p50": look["p50"],
        "lookup_us_p99": look["p99"],
        "insert_us_p50": put["p50"],
        "insert_us_p99": put["p99"],
        "hit_tokens": hits,
    }


def ceiling(sessions: list[list[np.ndarray]]) -> dict[str, object]:
    """Memcmp and copy of each whole prompt, at the same sizes."""
    compare, copy = [], []
    for session in sessions:
        data = b""
        for turn in session:
            data += turn.tobytes()
            other = bytes(bytearray(data))
            start = time.perf_counter_ns()
            assert data.startswith(other)
            middle = time.perf_counter_ns()
            bytes(memoryview(data))
            copy.append((time.perf_counter_ns() - middle) / 1e3)
            compare.append((middle - start) / 1e3)
    return {
        "form": "memcmp / copy",
        "lookup_us_p50": percentiles(compare)["p50"],
        "insert_us_p50": percentiles(copy)["p50"],
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    sessions = conversations(seed)
    run(sessions, "buffer")  # warm up
    rows = [run(sessions, form) for form in ("buffer", "cursor", "list")]
    assert len({row["hit_tokens"] for row in rows}) == 1, "every form must find the same prefixes"
    rows.append(ceiling(sessions))
    print(table(rows, ["form", "lookup_us_p50", "lookup_us_p99", "insert_us_p50", "insert_us_p99", "hit_tokens"]))
    save("index_sessions", rows, seed)


if __name__ == "__main__":
    main()
