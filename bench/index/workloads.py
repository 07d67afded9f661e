"""Six seeded workloads for an index of prompts.

    a  chat        200 sessions x 20 turns, round-robin, over 512 shared tokens; a turn adds 100 to 500 tokens
    b  document    one document of 100,000 tokens, 1,000 questions of 32 to 96 tokens
    c  repository  64 files of 2,000 to 8,000 tokens in a stable order; each of 300 requests sends all of them and a
                   question of 64 tokens. Before every tenth request a file is edited: 16 tokens at a random place
                   change, for good, and what follows them has to be inserted again.
    d  fan-out     50,000 sequences of 256 tokens, each after one prefix of 128
    e  evicting    a, in a quarter of the memory that a needs
    f  trace       the public conversation trace in a cache of 3 million tokens; a block of 512 tokens is made from its
                   id, a partial last block is the request's own

Tokens are below 50,000. A prompt is a contiguous int32 array, made outside whatever is timed. No workload holds more
while it runs than before it, so that memory measured around a run is the index's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

VOCABULARY = 50_000
PAGE = 16  # what capacities allow for: every prompt may end inside a page
TRACE = Path(__file__).parents[2] / "tests/data/traces/conversation_trace.jsonl.gz"
BLOCK = 512

TokenArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt.

    Attributes:
        prompt: [T] token ids.
        session: the growing conversation it belongs to, or -1.
        num_old: leading tokens that were that conversation's previous prompt.
    """

    prompt: TokenArray
    session: int = -1
    num_old: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order, and the memory to hold them in.

    Attributes:
        name: its letter.
        title: what it is, in a few words.
        capacity_tokens: tokens the cache holds.
        evicts: whether that is too few.
        num_sessions: growing conversations, 0 where there are none.
        requests: makes the same requests each time it is called.
    """

    name: str
    title: str
    capacity_tokens: int
    evicts: bool
    num_sessions: int
    requests: Callable[[], Iterator[Request]]


def make(name: str, seed: int = 0, *, quick: bool = False) -> Workload:
    """The workload with that letter; `quick` is a tenth of its requests, for trying things out."""
    return WORKLOADS[name](seed, 10 if quick else 1)


def random_tokens(rng: np.random.Generator, num_tokens: int) -> TokenArray:
    """[num_tokens] token ids."""
    return rng.integers(0, VOCABULARY, num_tokens, dtype=np.int32)


def tokens_of(ids: npt.ArrayLike, num_tokens: int) -> TokenArray:
    """[len(ids) * num_tokens] token ids, a pure function of each id (the splitmix64 mix of id and position)."""
    first = np.asarray(ids, np.uint64)[:, None] * np.uint64(num_tokens)
    x = (first + np.arange(num_tokens, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x >> np.uint64(33)) % np.uint64(VOCABULARY)).astype(np.int32).ravel()


def _chat(seed: int, scale: int) -> Workload:
    sessions, ends = _conversations(seed, 200 // scale)
    return Workload("a", "chat", _chat_need(ends), False, len(sessions), lambda: _turns(sessions, ends))


def _evicting(seed: int, scale: int) -> Workload:
    sessions, ends = _conversations(seed, 200 // scale)
    return Workload("e", "chat, 25 % memory", _chat_need(ends) // 4, True, len(sessions), lambda: _turns(sessions, ends))


def _conversations(seed: int, num_sessions: int) -> tuple[list[TokenArray], list[list[int]]]:
    rng = np.random.default_rng(seed)
    shared = random_tokens(rng, 512)
    ends = [(512 + np.cumsum(rng.integers(100, 501, 20))).tolist() for _ in range(num_sessions)]
    return [np.concatenate([shared, random_tokens(rng, end[-1] - 512)]) for end in ends], ends


def _chat_need(ends: Sequence[Sequence[int]]) -> int:
    return 512 + sum(end[-1] - 512 + PAGE for end in ends) + max(end[-1] for end in ends)


def _turns(sessions: Sequence[TokenArray], ends: Sequence[Sequence[int]]) -> Iterator[Request]:
    for turn in range(len(ends[0])):
        for index, session in enumerate(sessions):
            yield Request(session[: ends[index][turn]], index, ends[index][turn - 1] if turn else 0)


def _document(seed: int, scale: int) -> Workload:
    num_tokens, num_questions = 100_000, 1_000 // scale

    def requests() -> Iterator[Request]:
        rng = np.random.default_rng(seed)
        document = random_tokens(rng, num_tokens)
        for _ in range(num_questions):
            yield Request(np.concatenate([document, random_tokens(rng, int(rng.integers(32, 97)))]))

    return Workload("b", "100k-token document", num_tokens + num_questions * (96 + PAGE), False, 0, requests)


def _repository(seed: int, scale: int) -> Workload:
    num_requests = 300 // scale

    def requests() -> Iterator[Request]:
        rng = np.random.default_rng(seed)
        files = random_tokens(rng, int(rng.integers(2_000, 8_001, 64).sum()))
        for number in range(num_requests):
            if number % 10 == 9:
                place = int(rng.integers(0, len(files) - 16))
                files[place : place + 16] = random_tokens(rng, 16)
            yield Request(np.concatenate([files, random_tokens(rng, 64)]))

    need = sum(len(request.prompt) - known + PAGE for request, known in _edited(requests()))
    return Workload("c", "repository, 64 files", need, False, 0, requests)


def _edited(requests: Iterator[Request]) -> Iterator[tuple[Request, int]]:
    """Each request with how much of it the files as they stand had cached already: as far as two prompts agree."""
    last, cached = np.empty(0, np.int32), 0  # the longest sequence still valid, and how much of it
    for request in requests:
        files = request.prompt[:-64]
        both = min(len(files), cached)
        differs = np.flatnonzero(files[:both] != last[:both])
        if len(differs):
            cached = both = int(differs[0])
        yield request, both
        if len(files) > cached:
            last, cached = files, len(files)


def _fan_out(seed: int, scale: int) -> Workload:
    num_sequences = 50_000 // scale

    def requests() -> Iterator[Request]:
        rng = np.random.default_rng(seed)
        prefix = random_tokens(rng, 128)
        for _ in range(num_sequences):
            yield Request(np.concatenate([prefix, random_tokens(rng, 256)]))

    return Workload("d", "fan-out of 50,000", 128 + num_sequences * 256 + 1024, False, 0, requests)


def _trace(seed: int, scale: int) -> Workload:
    from radixkv.replay.formats import read_trace

    trace = [(request.blocks, request.num_input_tokens) for request in read_trace(TRACE)]
    trace = trace[: len(trace) // scale]
    num_blocks = 1 + max(int(blocks.max(initial=0)) for blocks, _ in trace)

    def requests() -> Iterator[Request]:
        for number, (blocks, num_tokens) in enumerate(trace):
            own = [num_blocks + number]  # an id no block has
            rest = tokens_of(own, BLOCK)[: num_tokens - len(blocks) * BLOCK]
            yield Request(np.concatenate([tokens_of(blocks + seed * 2**32, BLOCK), rest]))

    return Workload("f", "conversation trace", 3_000_000 // scale, True, 0, requests)


WORKLOADS: dict[str, Callable[[int, int], Workload]] = {
    "a": _chat,
    "b": _document,
    "c": _repository,
    "d": _fan_out,
    "e": _evicting,
    "f": _trace,
}
