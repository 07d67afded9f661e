"""The engine: `from radixkv.engine import Engine`. Needs the `engine` extra (torch, transformers).

Names are loaded when first used, so that fetching a model or asking for help does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from radixkv.engine.batcher import EngineStats
    from radixkv.engine.config import EngineConfig
    from radixkv.engine.engine import Engine
    from radixkv.engine.options import RequestOptions
    from radixkv.engine.output import Chunk, Completion
    from radixkv.engine.repository import FileCost, Repository, RepositoryAnswer
    from radixkv.engine.sampler import TokenLogprob
    from radixkv.engine.sampling import SamplingParams
    from radixkv.engine.serving import Answer, AsyncEngine
    from radixkv.engine.session import Session
    from radixkv.engine.structure import Structure

__all__ = [
    "Answer",
    "AsyncEngine",
    "Chunk",
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "FileCost",
    "Repository",
    "RepositoryAnswer",
    "RequestOptions",
    "SamplingParams",
    "Session",
    "Structure",
    "TokenLogprob",
]

_HOMES = {
    "Answer": "serving",
    "AsyncEngine": "serving",
    "Chunk": "output",
    "Completion": "output",
    "Engine": "engine",
    "EngineConfig": "config",
    "EngineStats": "batcher",
    "FileCost": "repository",
    "Repository": "repository",
    "RepositoryAnswer": "repository",
    "RequestOptions": "options",
    "SamplingParams": "sampling",
    "Session": "session",
    "Structure": "structure",
    "TokenLogprob": "sampler",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
