"""The header of a GGUF file, checked before anything heavy: every count and extent against the file's size.

"GGUF" version | tensors, keys | key value ... | name shape type offset ... | padding | tensor data ...
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from radixkv.errors import ModelCorrupt, UnsupportedModel

__all__ = ["GGUFFile", "GGUFTensor", "read_gguf", "tensor_values"]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies in the file; `shape` in torch's order."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A checked header. `metadata` holds scalars, strings and short arrays; of a long array its length."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]


def read_gguf(path: Path) -> GGUFFile:
    """Read and check the header of a GGUF file.

    Cost:    0.1 s for a vocabulary of 50,000; no tensor data is read.

    Raises:
        ModelCorrupt: wrong magic, an impossible count, or a tensor that lies outside the file.
    """
    num_bytes = path.stat().st_size
    if num_bytes < 24:
        raise ModelCorrupt(str(path), f"it has {num_bytes} bytes, a GGUF header alone has 24")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Header(path, data).read()
        except (struct.error, UnicodeDecodeError) as error:
            raise ModelCorrupt(str(path), f"its header is truncated or damaged ({error})") from error


def tensor_values(source: GGUFFile, tensors: Iterable[GGUFTensor]) -> Iterator[np.ndarray]:
    """Yield each tensor's values in float32."""
    data = np.memmap(source.path, dtype=np.uint8, mode="r")
    for tensor in tensors:
        raw = data[tensor.offset : tensor.offset + tensor.num_bytes]
        kind = {"F32": np.float32, "F16": np.float16}.get(tensor.kind.name)
        rows = raw.view(kind) if kind else raw
        try:
            values = gguf.dequantize(rows.reshape(*tensor.shape[:-1], -1), tensor.kind)
        except NotImplementedError:
            supported = "F32, F16, BF16 and the quantized types of llama.cpp"
            raise UnsupportedModel(str(source.path), f"GGUF with values of type {tensor.kind.name}", supported) from None
        yield values


class _Header:
    """A cursor over the header; every step is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.pos = path, data, 0

    def read(self) -> GGUFFile:
        if self.data[:4] != b"GGUF":
            raise self._corrupt("it does not start with the letters GGUF")
        self.pos = 4
        version, num_tensors, num_keys = self._unpack("IQQ")
        if version not in {2, 3}:
            raise self._corrupt(f"GGUF version {version} is not 2 or 3")
        if (num_tensors + num_keys) * 12 > len(self.data):
            raise self._corrupt(f"{num_tensors} tensors and {num_keys} keys cannot fit in {len(self.data)} bytes")
        metadata = {self._string(): self._value(self._unpack("I")[0]) for _ in range(num_keys)}
        table = [self._tensor() for _ in range(num_tensors)]
        align = metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise self._corrupt(f"alignment {align!r}")
        start = -(-self.pos // align) * align
        tensors = tuple(GGUFTensor(t.name, t.shape, t.kind, start + t.offset, t.num_bytes) for t in table)
        for tensor in tensors:
            if tensor.offset + tensor.num_bytes > len(self.data):
                end = tensor.offset + tensor.num_bytes
                raise self._corrupt(f"{tensor.name} ends at byte {end}, the file at {len(self.data)}: it is truncated")
        if not tensors or "general.architecture" not in metadata:
            raise self._corrupt("it holds no tensors or names no architecture")
        return GGUFFile(self.path, metadata, tensors)

    def _tensor(self) -> GGUFTensor:
        name, num_dims = self._string(), self._unpack("I")[0]
        if num_dims > 8:
            raise self._corrupt(f"{name} has {num_dims} dimensions")
        shape = tuple(reversed(self._unpack(f"{num_dims}Q")))
        code, offset = self._unpack("IQ")
        try:
            kind = gguf.GGMLQuantizationType(code)
        except ValueError:
            raise self._corrupt(f"{name} has the unknown type {code}") from None
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % per_block:
            raise self._corrupt(f"{name} of shape {shape} does not divide into {kind.name} blocks of {per_block}")
        return GGUFTensor(name, shape, kind, offset, math.prod(shape) // per_block * block_bytes)

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._corrupt(f"a metadata value has the unknown type {kind}")
        item, length = self._unpack("IQ")
        if length > len(self.data) or item not in {*_SCALARS, _STRING}:
            raise self._corrupt(f"an array of {length} values of type {item}")
        if item == _STRING:
            for _ in range(length):
                self._skip(self._unpack("Q")[0])
            return length
        if length <= 64:
            return list(self._unpack(f"{length}{_SCALARS[item]}"))
        self._skip(length * struct.calcsize(_SCALARS[item]))
        return length

    def _string(self) -> str:
        start, length = self.pos + 8, self._unpack("Q")[0]
        self._skip(length)
        return self.data[start : start + length].decode("utf-8")

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self.data, self.pos)
        self.pos += struct.calcsize("<" + form)
        return values

    def _skip(self, num_bytes: int) -> None:
        self.pos += num_bytes
        if self.pos > len(self.data):
            raise self._corrupt(f"its header runs past the end at byte {len(self.data)}: it is truncated")

    def _corrupt(self, reason: str) -> ModelCorrupt:
        return ModelCorrupt(str(self.path), reason)
