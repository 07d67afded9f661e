"""Capacities as a person writes them.

3014p                      pages                         20kp
2000000t   2Mt   1.5Mt     tokens                        whole pages of them
40GB   40GiB               bytes of KV                   needs a model shape
5%                         of the footprint              every distinct page of the traces
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

from radixkv.errors import ConfigError

__all__ = ["capacity_pages", "split_list"]

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z%]+)", re.ASCII)
_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_FORMS = "a number with p (pages), t (tokens), GB or GiB (bytes), or % (of the footprint): 3014p, 2Mt, 40GiB, 5%"
_MOST = 2**31 - 1


def capacity_pages(text: str, *, page_size: int, footprint_pages: int, bytes_per_token: int) -> int:
    """How many pages `text` stands for, rounded down; a percentage is at least one page.

    Args:
        text: a capacity, as in the module's table.
        page_size: tokens in a page.
        footprint_pages: distinct pages of the workload: what 100 % is.
        bytes_per_token: of KV, as the model shape has it.

    Raises:
        ConfigError: not a capacity, less than one page, or above int32.

    >>> shape = dict(page_size=512, footprint_pages=170_899, bytes_per_token=131_072)
    >>> [capacity_pages(text, **shape) for text in ("3014p", "2Mt", "40GiB", "40GB", "5%")]
    [3014, 3906, 640, 596, 8544]
    """
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        raise ConfigError("capacity", text, _FORMS)
    value, unit = Fraction(found[1]), found[2]
    scale, kind = _scale(unit[:-1]), unit[-1]
    if unit == "%":
        pages = max(value * footprint_pages / 100, Fraction(value > 0))
    elif scale is None:
        raise ConfigError("capacity", text, _FORMS)
    elif kind == "p":
        pages = value * scale
    elif kind == "t":
        pages = value * scale / page_size
    elif kind == "B":
        pages = value * scale / (bytes_per_token * page_size)
    else:
        raise ConfigError("capacity", text, _FORMS)
    if not 1 <= pages <= _MOST:
        raise ConfigError("capacity", text, f"1 to 2**31 - 1 pages of {page_size} tokens, not {float(pages):.4g}")
    return int(pages)


def split_list(values: Iterable[str]) -> list[str]:
    """Options given as a comma list, or repeated, or both; each once, in order.

    >>> split_list(["1%,5%", "5%", " 10% "])
    ['1%', '5%', '10%']
    """
    parts = (part.strip() for value in values for part in value.split(","))
    return list(dict.fromkeys(part for part in parts if part))


def _scale(prefix: str) -> int | None:
    return _DECIMAL.get(prefix) or _BINARY.get(prefix)
