"""radixkv: a prefix-caching radix-tree KV store.

The core (this import) needs numpy, xxhash and sortedcontainers; the engine, `from radixkv.engine import Engine`, adds
torch and transformers.
"""

from radixkv.cache import CacheStats, PrefixCache
from radixkv.errors import RadixKVError
from radixkv.lease import Cursor, Lease
from radixkv.namespace import Namespace
from radixkv.pins import Pin
from radixkv.retention import Retain
from radixkv.tokens import Tokens

__all__ = [
    "CacheStats",
    "Cursor",
    "Lease",
    "Namespace",
    "Pin",
    "PrefixCache",
    "RadixKVError",
    "Retain",
    "Tokens",
    "__version__",
]

__version__ = "0.1.0"
