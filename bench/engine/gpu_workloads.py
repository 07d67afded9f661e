"""The token ids behind the engine benchmarks on a GPU: seeded, the same for us and for every rival.

    chat      64 sessions x 6 turns; 1024 shared tokens, turns of 100-399, 128 out    sessions go on from round to round
    repo      8 contexts of 24,000 tokens x 8 questions of 64, 64 out                 every question is a session of its own
    longdoc   one context of 64,000 tokens: one question, then 31 at once, 32 out     likewise
    single    one context of 32,000 tokens: one question, then 8, one by one, 16 out  likewise

A round's requests are sent at once, the next round's when all are answered. A session's prompt is everything before it, its
answers included, and then the new tokens. The digests of the ids are in tests/test_gpu_workloads.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["SMALL", "WORKLOADS", "Ask", "Round", "Workload", "chat", "longdoc", "repo", "single", "warm_up"]

Ids = npt.NDArray[np.int32]

_LOW, _HIGH = 1_000, 120_000  # token ids, special ones left out


@dataclass(frozen=True, slots=True)
class Ask:
    """New tokens of one session."""

    session: int
    tokens: Ids


@dataclass(frozen=True, slots=True)
class Round:
    """What is sent at once, and how many tokens each answer has."""

    asks: tuple[Ask, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Rounds, one after another."""

    name: str
    rounds: tuple[Round, ...]


class _Source:
    """Draws token ids; the order of the draws is part of the workload."""

    def __init__(self, seed: int, high: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._high = high

    def tokens(self, count: int) -> Ids:
        return self._rng.integers(min(_LOW, self._high // 2), self._high, size=count).astype(np.int32)

    def length(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high))


def chat(
    *, sessions: int = 64, turns: int = 6, shared: int = 1024, turn: tuple[int, int] = (100, 400), out: int = 128,
    seed: int = 0, high: int = _HIGH,
) -> Workload:  # fmt: skip
    """Conversations behind one system prompt, all turns taken together; a turn has turn[0] to turn[1] - 1 tokens."""
    source = _Source(seed, high)
    system, nothing = source.tokens(shared), np.empty(0, np.int32)
    rounds = []
    for number in range(turns):
        before = nothing if number else system
        asks = [Ask(k, np.concatenate([before, source.tokens(source.length(*turn))])) for k in range(sessions)]
        rounds.append(Round(tuple(asks), out))
    return Workload("chat", tuple(rounds))


def repo(
    *, contexts: int = 8, context: int = 24_000, questions: int = 8, question: int = 64, out: int = 64, seed: int = 1,
    high: int = _HIGH,
) -> Workload:  # fmt: skip
    """Questions about several repositories; a round has one question about each."""
    source = _Source(seed, high)
    bodies = [source.tokens(context) for _ in range(contexts)]
    rounds = []
    for number in range(questions):
        asks = [
            Ask(place * questions + number, np.concatenate([body, source.tokens(question)]))
            for place, body in enumerate(bodies)
        ]
        rounds.append(Round(tuple(asks), out))
    return Workload("repo", tuple(rounds))


def longdoc(
    *, context: int = 64_000, questions: int = 32, question: int = 64, out: int = 32, seed: int = 2, high: int = _HIGH
) -> Workload:
    """Questions about one document: one to read it, then all others at once."""
    source = _Source(seed, high)
    body = source.tokens(context)
    asks = [Ask(k, np.concatenate([body, source.tokens(question)])) for k in range(questions)]
    return Workload("longdoc", (Round((asks[0],), out), Round(tuple(asks[1:]), out)))


def single(
    *, context: int = 32_000, questions: int = 9, question: int = 64, out: int = 16, seed: int = 3, high: int = _HIGH
) -> Workload:
    """Questions about one document, one by one: the first reads it, the others hit."""
    source = _Source(seed, high)
    body = source.tokens(context)
    asks = [Ask(k, np.concatenate([body, source.tokens(question)])) for k in range(questions)]
    return Workload("single", tuple(Round((ask,), out) for ask in asks))


def warm_up(sessions: int, *, high: int = _HIGH, context: int = 2_048, seed: int = 1_000) -> Workload:
    """Nobody's token ids, to warm up on: a long prompt, `sessions` questions about it at once, then a turn more of each."""
    source = _Source(seed, high)
    body = source.tokens(context)
    first = Round((Ask(0, np.concatenate([body, source.tokens(16)])),), 8)
    asks = [Ask(k, np.concatenate([body, source.tokens(40)])) for k in range(1, sessions + 1)]
    more = [Ask(k, source.tokens(40)) for k in range(1, sessions + 1)]
    return Workload("warm-up", (first, Round(tuple(asks), 8), Round(tuple(more), 8)))


WORKLOADS: dict[str, Callable[[], Workload]] = {"chat": chat, "repo": repo, "longdoc": longdoc, "single": single}
"""The real ones."""

SMALL: dict[str, Callable[[], Workload]] = {
    "chat": lambda: chat(sessions=4, turns=3, shared=48, turn=(5, 20), out=6, high=512),
    "repo": lambda: repo(contexts=2, context=100, questions=3, question=8, out=4, high=512),
    "longdoc": lambda: longdoc(context=200, questions=5, question=8, out=4, high=512),
    "single": lambda: single(context=160, questions=4, question=8, out=4, high=512),
}
"""The same at a size for a test on a CPU."""
