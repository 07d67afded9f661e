"""Who asks: API keys and the admin token, and the tenant that a key stands for.

    Authorization: Bearer KEY │ x-api-key: KEY ──▶ sha256 ──▶ compared with every key's, in constant time ──▶ tenant

Keys are kept as digests only, so that nothing that prints this object prints a key.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import final

from radixkv.errors import ConfigError

__all__ = ["Keyring", "cache_salt_of", "read_keys", "tenant_and_key", "tenant_of"]

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@final
class Keyring:
    """The keys that are let in.

    Args:
        entries: NAME=KEY or KEY, several of one name allowed (for changing a key); none: everybody is let in.
        admin_token: allows the admin routes; None: one is made.

    Attributes:
        made_token: the admin token, if it was made here; to be shown once.

    Raises:
        ConfigError: an entry that is empty, or one key under two names.
    """

    def __init__(self, entries: Iterable[str] = (), admin_token: str | None = None) -> None:
        self._keys = [(tenant, _digest(key)) for tenant, key in map(tenant_and_key, entries)]
        names: dict[bytes, set[str]] = {}
        for tenant, digest in self._keys:
            names.setdefault(digest, set()).add(tenant)
        if shared := next((sorted(one) for one in names.values() if len(one) > 1), None):
            raise ConfigError("api_keys", ", ".join(shared), "a key of its own for each of these names; they have the same")
        self.made_token = secrets.token_urlsafe(24) if admin_token is None else None
        self._admin = _digest(admin_token if admin_token is not None else self.made_token or "")

    @property
    def open(self) -> bool:
        """Whether no key is needed."""
        return not self._keys

    @property
    def tenants(self) -> Sequence[str]:
        """Every tenant's name, in order."""
        return sorted({tenant for tenant, _ in self._keys})

    def tenant(self, offered: str | None) -> str | None:
        """The tenant of a key, "" where none is needed, or None. Compares with every key, whichever fits."""
        if self.open:
            return ""
        digest = _digest(offered or "")
        found = None
        for tenant, expected in self._keys:
            if compare_digest(digest, expected):
                found = tenant
        return found

    def is_admin(self, offered: str | None) -> bool:
        """Whether this is the admin token."""
        return compare_digest(_digest(offered or ""), self._admin)


def tenant_and_key(entry: str) -> tuple[str, str]:
    """Split NAME=KEY; a KEY alone gets a tenant named after its digest. What only ends in "=" (base64) is a key alone.

    Raises:
        ConfigError: the entry is empty.

    >>> tenant_and_key("alice=s3cret")
    ('alice', 's3cret')
    >>> tenant_and_key("c2VjcmV0==")[1]
    'c2VjcmV0=='
    """
    entry = entry.strip()
    if not entry:
        raise ConfigError("api_key", "", "NAME=KEY or KEY, not empty")
    name, sign, key = entry.partition("=")
    if sign and key.strip("=") and _NAME.fullmatch(name):
        return name, key
    return f"key-{_digest(entry).hex()[:8]}", entry


def read_keys(path: Path) -> list[str]:
    """The entries of a file of keys, one a line; empty lines and lines that start with # are left out.

    Raises:
        ConfigError: it cannot be read, or has none: without a key, everybody would be let in.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("api_keys_file", str(path), f"a readable file of keys ({error})") from error
    entries = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not entries:
        raise ConfigError("api_keys_file", str(path), "at least one key in it; to let everybody in, name no file")
    return entries


def cache_salt_of(tenant: str, cache_salt: str | None) -> str:
    """The cache's namespace of a tenant and a request's salt: each framed by its length, so no two pairs run together.

    >>> cache_salt_of("a", "bc") == cache_salt_of("ab", "c")
    False
    """
    salt = cache_salt or ""
    return f"{len(tenant)}:{tenant}{len(salt)}:{salt}" if tenant or salt else ""


def tenant_of(salt: str) -> str:
    """The tenant in what `cache_salt_of` made.

    >>> tenant_of(cache_salt_of("a:b", "1:c")), tenant_of(cache_salt_of("", "c")), tenant_of("")
    ('a:b', '', '')
    """
    length, _, rest = salt.partition(":")
    return rest[: int(length)] if length else ""


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogatepass")).digest()
