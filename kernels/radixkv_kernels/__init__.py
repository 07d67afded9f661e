"""Attention and page moves over the paged KV pool: plain tensors in, plain tensors out."""

__all__ = ["__version__"]

__version__ = "0.1.0"
