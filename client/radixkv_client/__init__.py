"""The HTTP client of the radixkv service; imports neither torch nor radixkv."""

__all__ = ["__version__"]

__version__ = "0.1.0"
