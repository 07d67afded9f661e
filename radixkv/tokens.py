"""Token ids as one contiguous run of int32 bytes.

A prompt is compared with cached edges by `bytes.startswith`, one memcmp with no copy, so the cache holds token ids
as the bytes of a native int32 array. Anything a tokenizer may hand over is converted and checked once, here:

    list[int], array, numpy, torch, raw bytes  --Tokens()-->  data: bytes, 4 bytes a token, every id in 0..2**31-1

Reading boxed integers out of a list costs 20 to 40 ns a token, 5 to 8 compiled, many times the compare that follows; whoever
holds tokens as a buffer (numpy, torch, bytes) pays a copy only, and whoever keeps a `Tokens` pays nothing again.
"""

from __future__ import annotations

import operator
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from radixkv.errors import ConfigError, TokenRangeError, TokenTypeError
from radixkv.prefix import TOKEN_BYTES

_pack: Callable[[object], bytes | None] | None
try:  # compiled where there is a C compiler (docs/design/0008-native.md)
    from radixkv._pack import pack as _pack
except ImportError:
    _pack = None

__all__ = ["NOTHING", "TokenInput", "Tokens", "as_count", "token_bytes"]

_SMALL = 8192  # bytes; below this a strided slice beats numpy's call overhead

TokenInput = Any
"""What `Tokens()` accepts: Tokens, list[int], tuple, range, array, 1-D integer numpy array or tensor, int32 bytes."""


NOTHING: Final[tuple[int, ...]] = ()
"""No tokens; told apart by identity, because converting it would take a microsecond."""


class Tokens(Sequence[int]):
    """An immutable, checked sequence of token ids: int32, contiguous.

    Args:
        ids: [T] token ids, T >= 0, as anything in `TokenInput`. Raw bytes are native int32, 4 bytes a token.

    Cost: one copy for buffers (about 0.1 ns a byte), 20 to 40 ns a token for lists, 5 to 8 compiled; free for a `Tokens`.

    Raises:
        TokenTypeError: not one flat sequence of integers.
        TokenRangeError: an id below 0 or above 2**31 - 1.

    >>> Tokens([1, 2, 3])
    Tokens([1, 2, 3])
    >>> Tokens(range(5))[1:3].tolist()
    [1, 2]
    """

    __slots__ = ("data",)

    data: bytes

    def __init__(self, ids: TokenInput = NOTHING) -> None:
        self.data = b"" if ids is NOTHING else token_bytes(ids)

    @staticmethod
    def _of(data: bytes) -> Tokens:
        tokens = Tokens()
        tokens.data = data
        return tokens

    @property
    def array(self) -> npt.NDArray[np.int32]:
        """[T] int32, a read-only view of the same memory."""
        return np.frombuffer(self.data, np.int32)

    def tolist(self) -> list[int]:
        """The ids as Python integers; O(T)."""
        return memoryview(self.data).cast("i").tolist()

    def __len__(self) -> int:
        return len(self.data) // TOKEN_BYTES

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Tokens: ...
    def __getitem__(self, index: int | slice) -> int | Tokens:
        if isinstance(index, slice):
            return Tokens._of(self.array[index].tobytes())
        return memoryview(self.data).cast("i")[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.tolist())

    def __add__(self, other: TokenInput) -> Tokens:
        return Tokens._of(self.data + token_bytes(other))

    def __eq__(self, other: object) -> bool:
        return self.data == other.data if isinstance(other, Tokens) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.data)

    def __repr__(self) -> str:
        if len(self) <= 16:
            return f"Tokens({self.tolist()})"
        return f"Tokens([{', '.join(map(str, self[:8]))}, ... {len(self)} in all])"


def token_bytes(ids: TokenInput) -> bytes:
    """Convert and check token ids; return them as native int32 bytes.

    Cost, Raises: as `Tokens`.
    """
    kind = type(ids)
    if kind is Tokens:
        return ids.data  # type: ignore[no-any-return]
    if kind is list or kind is tuple or kind is range:
        return _from_integers(ids)
    if kind is bytes or kind is bytearray or kind is memoryview:
        return _from_raw(ids)
    return _from_array(ids)


def as_count(setting: str, value: object) -> int:
    """A number of tokens or pages as a Python integer, whatever type of integer it was given as.

    Raises:
        ConfigError: not an integer; half a page would only be noticed when locks have moved.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(setting, value, "an integer") from None


def _from_integers(ids: list[int] | tuple[int, ...] | range) -> bytes:
    if _pack is not None:
        packed = _pack(ids)
        if packed is not None:
            return packed
    try:
        data = struct.pack(f"{len(ids)}i", *ids)
    except (struct.error, TypeError):
        raise _named_error(ids) from None
    if _has_negative(data):
        raise _named_error(ids)
    return data


def _from_raw(raw: bytes | bytearray | memoryview) -> bytes:
    if isinstance(raw, memoryview) and (raw.ndim != 1 or raw.format not in ("B", "b", "c", "i")):
        return _from_array(raw)
    data = bytes(raw)
    if len(data) % TOKEN_BYTES:
        raise TokenTypeError(f"{len(data)} raw bytes, which is not a multiple of {TOKEN_BYTES}")
    if _has_negative(data):
        raise _named_error(memoryview(data).cast("i").tolist())
    return data


def _from_array(ids: object) -> bytes:
    if not (hasattr(ids, "__array__") or isinstance(ids, (array, memoryview))):
        return _from_other(ids)
    try:
        is_tensor = hasattr(ids, "detach") and hasattr(ids, "cpu")  # torch's, on any device
        values = np.asarray(ids.detach().cpu() if is_tensor else ids)  # type: ignore[attr-defined]
    except (TypeError, ValueError, NotImplementedError) as error:
        raise TokenTypeError(f"{type(ids).__name__} ({error})") from error
    if values.ndim != 1:
        raise TokenTypeError(f"an array of shape {values.shape}")
    if values.dtype.kind not in "iu":
        raise TokenTypeError(f"an array of dtype {values.dtype}")
    if values.size and (int(values.min()) < 0 or int(values.max()) > 0x7FFFFFFF):
        raise _named_error(values.tolist())
    return values.astype(np.int32, copy=False).tobytes()


def _from_other(ids: object) -> bytes:
    if _is_buffer(ids):  # a subclass of bytes, an mmap
        return _from_raw(memoryview(ids))  # type: ignore[arg-type]
    if isinstance(ids, Sequence) and not isinstance(ids, str):
        return _from_integers(list(ids))
    raise TokenTypeError(type(ids).__name__)


def _is_buffer(value: object) -> bool:
    try:
        memoryview(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _has_negative(data: bytes) -> bool:
    """Whether any int32 in `data` has its sign bit set (the top byte of each is the fourth: little-endian)."""
    if len(data) <= _SMALL:
        return not data[3::4].isascii()
    return int(np.frombuffer(data, np.int32).min()) < 0


def _named_error(ids: Sequence[object]) -> TokenTypeError | TokenRangeError:
    """The error that names the first id which cannot be a token."""
    for index, value in enumerate(ids):
        try:
            number = value.__index__()  # type: ignore[attr-defined]
        except (AttributeError, TypeError):
            return TokenTypeError(f"{value!r} ({type(value).__name__}) at index {index}")
        if not 0 <= number <= 0x7FFFFFFF:
            return TokenRangeError(int(number), index)
    return TokenTypeError("a sequence that cannot be packed as int32")
