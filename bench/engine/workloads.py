"""The token ids behind the engine benchmarks: the same for us and for every rival.

chat         3 sessions of 6 turns, sent round-robin; 999 shared tokens, turns of 60-65 tokens, 32 greedy tokens each
repository   one context of about 6,000 tokens of real source (the standard library's json), 5 questions, 16 greedy tokens
"""

from __future__ import annotations

import inspect
import json
import json.decoder
import json.encoder
import json.scanner
import json.tool

import numpy as np

from radixkv.engine.models import resolve_model
from radixkv.engine.tokenizer import Tokenizer

SESSIONS, TURNS, SHARED, CHAT_OUT = 3, 6, 999, 32
CONTEXT, REPO_OUT = 5_998, 16

_QUESTIONS = (
    "\n\nQ: Which exception does the decoder raise for invalid documents, and which attributes does it have?\nA:",
    "\n\nQ: What does raw_decode return when there is text after the first document in the string?\nA:",
    "\n\nQ: Which separators does the encoder use when indent is given, and which when it is None?\nA:",
    "\n\nQ: How does the scanner tell numbers from other tokens, and which regular expression is it?\nA:",
    "\n\nQ: Which function escapes strings to ASCII, and how are characters outside the BMP written?\nA:",
)


def chat_turns(seed: int) -> list[list[np.ndarray]]:
    """[session][turn] new token ids; the first turn carries the shared system prompt."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(100, 40_000, SHARED, dtype=np.int32)
    sessions = []
    for _ in range(SESSIONS):
        turns = [rng.integers(100, 40_000, int(rng.integers(60, 66)), dtype=np.int32) for _ in range(TURNS)]
        sessions.append([np.concatenate([shared, turns[0]]), *turns[1:]])
    return sessions


def repository_prompts() -> list[np.ndarray]:
    """Five prompts: one context of real source, then a question."""
    tokenizer = Tokenizer(resolve_model("smollm2").path)
    modules = (json, json.decoder, json.encoder, json.scanner, json.tool)
    source = "\n\n".join(f"# file: {module.__name__}\n{inspect.getsource(module)}" for module in modules)
    context = tokenizer.encode(source)[:CONTEXT]
    return [np.concatenate([context, tokenizer.encode(question)]) for question in _QUESTIONS]
