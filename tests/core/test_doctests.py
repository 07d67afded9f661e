from __future__ import annotations

import doctest
import importlib

import pytest

CORE = (
    "tokens",
    "prefix",
    "node",
    "siblings",
    "match",
    "tree",
    "pages",
    "policies",
    "allocator",
    "check",
    "drawing",
    "events",
    "namespace",
    "lease",
    "leasing",
    "stats",
    "cache",
    "errors",
)


@pytest.mark.parametrize("name", CORE)
def test_the_examples_in_the_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(f"radixkv.{name}")).failed == 0


@pytest.mark.pure
def test_there_are_examples():
    modules = [importlib.import_module(f"radixkv.{name}") for name in CORE]
    assert sum(len(found.examples) for module in modules for found in doctest.DocTestFinder().find(module)) >= 12
