"""Values from JSON, without the halves of characters that JSON can escape and UTF-8 cannot carry."""

from __future__ import annotations

import json
from typing import Any

from radixkv_service.errors import clean

__all__ = ["clean_json"]


def clean_json(value: Any) -> Any:
    r"""The same value, with "?" for every half of a character.

    >>> clean_json({"\ud800": ["ok", 1]})
    {'?': ['ok', 1]}
    """
    return json.loads(clean(json.dumps(value, ensure_ascii=False)))
