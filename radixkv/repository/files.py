"""The files of a source tree that a model can read.

What git ignores is left out: by git itself where the tree is a git repository, otherwise by the .gitignore files in it.
What is no readable text (binary, too large, a link, a repository inside) is skipped and named: nothing disappears silently.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from pathspec import GitIgnoreSpec

from radixkv.errors import ConfigError, RepositoryError
from radixkv.repository.git import run_git
from radixkv.repository.ignore import check_pattern, patterns_of

__all__ = ["Listing", "Skipped", "SourceFile", "list_files"]

log = logging.getLogger("radixkv.repository")

_SNIFFED = 8192  # bytes; a NUL among the first of them means binary, as for git


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A text file.

    Attributes:
        path: below the root, with forward slashes.
        content_id: blake2b-128 of its bytes, in hex: equal for equal contents.
        text: its contents, line ends as they are.
    """

    path: str
    content_id: str
    text: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that is left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What was found: text files by path, and what was left out."""

    files: tuple[SourceFile, ...]
    skipped: tuple[Skipped, ...]


def list_files(
    root: str | Path, *, exclude: Sequence[str] = (), max_file_bytes: int = 262_144, max_files: int = 20_000
) -> Listing:
    """Read a source tree. A file that vanishes meanwhile was never there.

    Cost: one read of every file that is not ignored.

    Args:
        root: its folder.
        exclude: more patterns to leave out, as a .gitignore writes them, of at most 1024 characters each.
        max_file_bytes: larger files are skipped.
        max_files: a tree of more is refused: likely not the folder that was meant.

    Raises:
        RepositoryError: there is no such folder, it cannot be read, or has too many files.
        ConfigError: a pattern that is none, or too long.
    """
    folder = Path(root)
    _require_folder(folder)
    excluded = _excluded(exclude)
    files: list[SourceFile] = []
    skipped: list[Skipped] = []
    linked: dict[str, bool] = {}
    paths = sorted(
        path for path in _candidates(folder) if not excluded.match_file(path) and not _below_link(folder, path, linked)
    )
    if len(paths) > max_files:
        reason = f"it has {len(paths):,} files and the limit is {max_files:,}; name a folder in it, or exclude some"
        raise RepositoryError(str(root), reason)
    for path in paths:
        found = _read(folder, path, max_file_bytes)
        if isinstance(found, SourceFile):
            files.append(found)
        elif found is not None:
            skipped.append(found)
    return Listing(tuple(files), tuple(skipped))


def _below_link(folder: Path, path: str, linked: dict[str, bool]) -> bool:
    """Whether a folder on the way to it is a link: git still names the files of a folder that has become one."""
    parent = path.rpartition("/")[0]
    if not parent:
        return False
    if parent not in linked:
        linked[parent] = _below_link(folder, parent, linked) or (folder / parent).is_symlink()
    return linked[parent]


def _require_folder(folder: Path) -> None:
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise RepositoryError(str(folder), "it is not a folder; name the folder that the file is in")
        with os.scandir(folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise RepositoryError(str(folder), f"the folder cannot be read ({_why(error)})") from error


def _read(folder: Path, path: str, max_file_bytes: int) -> SourceFile | Skipped | None:
    """A file's contents, or why they are left out; None if it is gone."""
    shown = path.encode("utf-8", "replace").decode("utf-8")
    try:
        kind = _kind(folder / path)
        if kind:
            return Skipped(shown, kind)
        with (folder / path).open("rb") as file:
            data = file.read(max_file_bytes + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        return Skipped(shown, f"cannot be read ({_why(error)})")
    try:
        return SourceFile(path, blake2b(data, digest_size=16).hexdigest(), _text(data, max_file_bytes, shown == path))
    except ValueError as reason:
        return Skipped(shown, str(reason))


def _text(data: bytes, max_file_bytes: int, named: bool) -> str:
    """A file's text; a ValueError says why it has none."""
    if b"\0" in data[:_SNIFFED]:
        raise ValueError("binary")
    if len(data) > max_file_bytes:
        raise ValueError(f"larger than {max_file_bytes:,} bytes")
    if not named:
        raise ValueError("its name is not UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None


def _kind(full: Path) -> str:
    """What it is, if it is no regular file."""
    mode = full.lstat().st_mode
    if stat.S_ISREG(mode):
        return ""
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if not stat.S_ISDIR(mode):
        return "a pipe, socket or device"
    with os.scandir(full):  # the walk could not look into it, or git names it instead of what is in it
        return "a repository of its own (a submodule, or a clone); ask about it by itself"


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _candidates(folder: Path) -> Iterator[str]:
    """Paths of all files that are not ignored, once each; links and repositories inside among them."""
    printed = run_git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if printed:
        return iter({os.fsdecode(path).rstrip("/") for path in printed.split(b"\0") if path})
    return _walk(folder)  # no repository; or git ignores the whole folder, which was asked for all the same


def _walk(folder: Path) -> Iterator[str]:
    """Every file that no .gitignore leaves out; a deeper one has the last word, as for git."""
    specs: dict[str, GitIgnoreSpec] = {}
    unread: list[str] = []
    for where, folders, names in os.walk(folder, onerror=lambda error: unread.append(error.filename)):
        here = PurePosixPath(Path(where).relative_to(folder).as_posix())
        if ".gitignore" in names:
            specs[here.as_posix()] = _ignored_by(Path(where) / ".gitignore")
        inside = [one for one in folders if one != ".git" and not _ignored(specs, f"{(here / one).as_posix()}/")]
        links = [one for one in inside if (Path(where) / one).is_symlink()]
        folders[:] = sorted(set(inside) - set(links))
        for name in (*links, *names):
            path = (here / name).as_posix()
            if name != ".git" and not _ignored(specs, path):  # a file of that name stands in worktrees and submodules
                yield path
    if unread:  # named like git's: the first read of such a folder fails again, and says why
        yield from (Path(one).relative_to(folder).as_posix() for one in unread)


def _excluded(patterns: Sequence[str]) -> GitIgnoreSpec:
    for pattern in patterns:
        try:
            check_pattern(pattern)
        except ValueError as error:
            shown = pattern if len(pattern) <= 80 else f"{pattern[:77]}..."
            raise ConfigError("exclude", shown, f"a pattern as in a .gitignore ({error})") from error
    return patterns_of(patterns)


def _ignored_by(file: Path) -> GitIgnoreSpec:
    """The patterns of a .gitignore; a line that is none is passed over, as git does."""
    try:
        lines = file.read_text("utf-8", "replace").splitlines()
    except OSError:  # it is listed itself, and named there as unreadable
        lines = []
    good: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            check_pattern(line)
        except ValueError as error:
            log.warning("%s, line %d is passed over: %s", file, number, error)
        else:
            good.append(line)
    return patterns_of(good)


def _ignored(specs: dict[str, GitIgnoreSpec], path: str) -> bool:
    verdict = False
    for parent in reversed(PurePosixPath(path).parents):
        spec = specs.get(parent.as_posix())
        if spec is not None:
            inside = path if parent.as_posix() == "." else path[len(parent.as_posix()) + 1 :]
            told = spec.check_file(inside).include
            verdict = verdict if told is None else told
    return verdict
