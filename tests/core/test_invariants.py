"""docs/invariants.md mirrors check(): what it quotes stands in the code, and what check() raises stands in it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import radixkv.check
from radixkv.pages import PagePool
from radixkv.tree import RadixTree

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "invariants.md").read_text("utf-8")
PARTS = {found[1]: found[2] for found in re.finditer(r"\*\*(I\d+)\. (.*?)(?=\n\*\*I\d|\Z)", TEXT, re.DOTALL)}
OWNERS = {"PagePool": PagePool, "RadixTree": RadixTree}


def test_the_invariants_are_numbered_one_to_ten():
    assert list(PARTS) == [f"I{number}" for number in range(1, 11)]


@pytest.mark.pure
@pytest.mark.parametrize("name", PARTS)
def test_every_line_that_is_quoted_stands_where_it_is_said_to(name):
    checks = re.findall(r"^- (.*(?:\n  .*)*)", PARTS[name], re.MULTILINE)
    assert checks
    for check in checks:
        place, *quotes = re.findall(r"`(.*?)`", check.replace("\n  ", " "))
        assert quotes
        if place.endswith(".py"):
            source = (ROOT / place).read_text("utf-8")
        else:
            owner, method = place.split(".")
            source = inspect.getsource(getattr(OWNERS[owner], method))
        for quote in quotes:
            assert quote in source, (place, quote)


@pytest.mark.pure
def test_whatever_check_raises_is_in_the_list():
    for owner in (PagePool, radixkv.check):
        raised = re.findall(r'InvariantError\("(\w+)"', inspect.getsource(owner))
        assert raised
        assert set(raised) <= set(PARTS)
