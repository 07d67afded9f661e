"""The embedded engine: `from radixkv.engine import Engine`. Needs the `engine` extra (torch, transformers)."""

from radixkv.engine.config import EngineConfig, SamplingParams
from radixkv.engine.engine import Engine, EngineStats
from radixkv.engine.output import Chunk, Completion
from radixkv.engine.sampler import TokenLogprob
from radixkv.engine.session import Session

__all__ = ["Chunk", "Completion", "Engine", "EngineConfig", "EngineStats", "SamplingParams", "Session", "TokenLogprob"]
