"""Empty modules in place of what a rival's package imports and its prefix cache never uses.

The rivals are serving engines: importing their cache imports image and kernel libraries too, gigabytes of them. What
is named in `UNUSED` is answered by modules whose every attribute is an inert class. If the cache did use one, its
result would be nonsense and the comparison of hits would fail.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

UNUSED = (
    "compressed_tensors",
    "cuda",
    "flashinfer",
    "gguf",
    "sentencepiece",
    "torchaudio",
    "torchvision",
    "tvm_ffi",
    "xgrammar",
)


class _Inert(type):
    """A class whose attributes are inert classes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class Anything(metaclass=_Inert):
    """Can be called, subclassed, used as a decorator or an annotation; does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Another one."""
        return Anything()

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> dict[str, Any]:
        return {"type": "any"}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class _Finder:
    """Finds the modules of `UNUSED`, and makes them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec for a stand-in, None for every other module."""
        del path, target
        if name.partition(".")[0] not in self._names:
            return None
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An inert module."""
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def install() -> None:
    """Answer imports of what is unused and not installed."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        _settle_transformers()
        sys.meta_path.append(_Finder(name for name in UNUSED if find_spec(name) is None))  # type: ignore[arg-type]


def _settle_transformers() -> None:
    """Let transformers notice, once for all, that torchvision is absent: it would ask for its version later."""
    try:
        from transformers.utils import is_torchvision_available
    except ImportError:
        return
    is_torchvision_available()
