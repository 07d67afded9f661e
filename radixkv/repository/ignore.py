r"""Patterns of a .gitignore that anybody may have written, matched without backtracking.

pathspec reads a pattern and makes a regular expression of it. Python's `re` tries every way in which its wildcards could
share a name out, which takes years for `*?*?*?*?*?*?*?*?*?*?~`, and nothing else runs meanwhile. A glob needs no second try:

    a*b*c    after each * but the last, the first place that fits is as good as any        (?>[^/]*?b)
    x/y      a part between slashes ends at one place only                                 (?>y(?=/|$))
    **/x/**  folders are passed one by one; again the first place that fits will do        (?>(?:[^/]++/)*?x)

so each piece becomes an atomic group, and a name of N characters costs O(N * characters of the pattern) at worst.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pathspec import GitIgnoreSpec
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

__all__ = ["MAX_PATTERN", "AtomicPattern", "check_pattern", "patterns_of"]

MAX_PATTERN = 1024
"""Characters of the longest pattern."""

# What pathspec writes for wildcards. All but the first have a slash in them, which no part between two slashes can have.
_ANYTHING = "(?:.+/)?"
_INNER = "(?:/.+)?"
_STAR = "[^/]*"
_TAILS = ("(?:(?P<ps_d>/)|$)", "(?P<ps_d>/)", "/")
_SLASH = re.compile(r"(?<!\[\^)/")  # but not that of "any character except a slash"
_SET = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)  # or an escaped character, which may be a bracket


class AtomicPattern(GitIgnoreSpecPattern):
    """One line of a .gitignore, as pathspec reads it, matched in bounded time."""

    @classmethod
    def pattern_to_regex(cls, pattern: Any) -> tuple[Any, bool | None]:
        """The regular expression of a line, and whether what matches is left out; None for what is no pattern.

        Raises:
            ValueError: git would not read it either.
        """
        regex, include = super().pattern_to_regex(pattern)
        return (regex if regex is None else _atomic(regex)), include


def check_pattern(line: str) -> None:
    """Refuse what is no pattern, or too long for one.

    Raises:
        ValueError: why.
    """
    if len(line) > MAX_PATTERN:
        raise ValueError(f"it has {len(line):,} characters and the limit is {MAX_PATTERN:,}")
    AtomicPattern(line)


def patterns_of(lines: Sequence[str]) -> GitIgnoreSpec:
    """Patterns that were checked, as one: the last that matches decides."""
    # NOTE: pathspec takes another engine where one is installed; those know no atomic groups.
    return GitIgnoreSpec.from_lines(lines, AtomicPattern, backend="simple")


def _atomic(regex: str) -> str:
    """The same language, without a way to try twice."""
    if not regex.startswith("^"):  # "everything", or "everything in a folder"
        return regex
    tail = next(one for one in _TAILS if regex.endswith(one))
    body = regex[1 : -len(tail)]
    anywhere = body.startswith(_ANYTHING)
    first, *others = body.removeprefix(_ANYTHING).split(_INNER)
    pieces = [("[^/]++/" if anywhere else "", _parts(first)), *(("/[^/]++", _parts(one)) for one in others)]
    # NOTE: the last piece takes the last place that fits: pathspec ranks a match of the file over one of its folder.
    *early, (skipped, last) = pieces
    before = "".join(f"(?>{_many(skip)}?{piece})" if skip else piece for skip, piece in early)
    return f"^{before}{_many(skipped)}{last}{tail}"


def _many(folders: str) -> str:
    return f"(?:{folders})*" if folders else ""


def _parts(piece: str) -> str:
    return "/".join(_part(one) if one else "" for one in _SLASH.split(piece))


def _part(part: str) -> str:
    """What stands between two slashes, all of it."""
    first, *others = (_SET.sub(_no_slash, one) for one in part.split(_STAR))
    if others:
        *middle, last = others
        first += "".join(f"(?>{_STAR}?{one})" for one in middle if one) + f"{_STAR}{last}"
    return f"(?>{first}(?=/|$))"


def _no_slash(found: re.Match[str]) -> str:
    """A set of characters, [!a] say, holds no slash in git, whatever it says."""
    return found[0] if found[0][0] == "\\" or found[0] == "[^/]" else f"(?!/){found[0]}"
