from __future__ import annotations

import inspect
import re

import pytest

import radixkv.errors
from radixkv.errors import RadixKVError

CLASSES = {
    name: item
    for name, item in vars(radixkv.errors).items()
    if inspect.isclass(item) and issubclass(item, Exception) and item.__module__ == radixkv.errors.__name__
}


def drawn_tree() -> dict[str, tuple[str | None, list[str]]]:
    """Each name in the drawing: what it hangs under, and the built-in errors in brackets beside it."""
    tree, above = {}, {}
    for line in radixkv.errors.__doc__.splitlines():
        found = re.fullmatch(r"    ([│ ├└─]*)(\w+)(?: \(([\w, ]+)\))?(?:  .*)?", line)
        if found:
            depth = len(found[1]) // 4
            tree[found[2]] = above.get(depth - 1), found[3].split(", ") if found[3] else []
            above[depth] = found[2]
    return tree


def test_the_drawing_is_the_tree():
    drawn = drawn_tree()
    assert set(drawn) == set(CLASSES)
    for name, (parent, built_in) in drawn.items():
        bases = [base.__name__ for base in CLASSES[name].__bases__]
        assert bases == ([parent] if parent else ["Exception"]) + built_in, name


def test_every_error_is_exported_in_order():
    assert radixkv.errors.__all__ == sorted(CLASSES)
    assert all(CLASSES[name].__doc__ for name in CLASSES)


SAMPLES = {"int": 7, "str": "seven", "object": [7], "bytes": b"7", "float": 0.7}


def made(kind: type[RadixKVError]) -> tuple[RadixKVError, dict[str, object]]:
    """The error, made from a value of the stated type for each of its parameters."""
    given = {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and parameter.default is inspect.Parameter.empty:
            given[name] = SAMPLES[str(parameter.annotation).split(" | ")[0]]
    return kind(**given), given


LEAVES = [kind for kind in CLASSES.values() if not kind.__subclasses__() or kind.__init__ is not RadixKVError.__init__]


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_every_error_carries_its_facts_as_fields_and_says_them(kind):
    error, given = made(kind)
    assert isinstance(error, RadixKVError)
    for name, value in given.items():
        assert error.fields[name] == value
        assert getattr(error, name) == value
    text = str(error)
    assert len(text) > 20
    for value in given.values():
        assert str(value) in text


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_an_error_carries_no_field_only_where_there_is_no_fact_to_tell(kind):
    error, given = made(kind)
    assert bool(error.fields) == bool(given)
    assert error.args == (str(error),)


def test_errors_are_caught_as_the_built_in_ones_they_are():
    for name, built_in in (("TokenError", ValueError), ("TokenTypeError", TypeError), ("ConfigError", ValueError)):
        assert issubclass(CLASSES[name], built_in)
    assert not issubclass(RadixKVError, (ValueError, TypeError, LookupError, OSError))


def test_a_broken_invariant_tells_which_and_the_state():
    error = radixkv.errors.InvariantError("I3", page=17, state="odd")
    assert (error.invariant, error.page, error.state) == ("I3", 17, "odd")
    assert "I3" in str(error)
    assert "page=17" in str(error)
