from __future__ import annotations

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pathspec import GitIgnoreSpec

from radixkv.errors import ConfigError, RepositoryError
from radixkv.repository import list_files
from radixkv.repository.ignore import check_pattern, patterns_of

FILES = {
    "main.py": b"print('hello')\n",
    "pkg/a.py": b"a = 1\n",
    "pkg/b.log": b"noise",
    "pkg/keep.log": b"kept",
    "build/out.txt": b"made",
    "deep/.gitignore": b"*.tmp\n!wanted.tmp\n!\n",
    "deep/x.tmp": b"x",
    "deep/wanted.tmp": b"w",
    "deep/er/y.tmp": b"y",
    "data.bin": b"a\0b",
    "latin.txt": b"caf\xe9",
    "empty.txt": b"",
    "dos.txt": b"one\r\ntwo\r\n",
    "uml\u00e4ut name.md": "gr\u00fc\u00df".encode(),
    ".gitignore": b"*.log\n!keep.log\n/build/\n",
}
EXPECTED = {
    ".gitignore",
    "deep/.gitignore",
    "deep/wanted.tmp",
    "dos.txt",
    "empty.txt",
    "main.py",
    "pkg/a.py",
    "pkg/keep.log",
    "uml\u00e4ut name.md",
}


@pytest.fixture
def tree(tmp_path, write):
    root = tmp_path / "tree"
    write(root, FILES)
    (root / "link.py").symlink_to(root / "main.py")
    (root / "folder_link").symlink_to(root / "pkg")
    return root


def paths(listing):
    return {file.path for file in listing.files}


def reasons(listing):
    return {one.path: one.reason for one in listing.skipped}


def test_what_git_ignores_is_left_out_with_and_without_git(tree, git):
    without = list_files(tree)
    git(tree, "init", "-q")
    with_git = list_files(tree)
    assert paths(without) == EXPECTED
    assert with_git == without
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "all")
    assert list_files(tree) == without


def test_where_git_is_not_installed_the_patterns_are_read_all_the_same(tree, git, monkeypatch, tmp_path):
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    before = list_files(tree)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert list_files(tree) == before


def test_the_index_of_another_repository_in_the_environment_is_not_read(tree, git, monkeypatch, tmp_path):
    git(tree, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other.git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "other.index"))
    assert paths(list_files(tree)) == EXPECTED


def test_a_program_named_in_the_repositorys_settings_is_not_run(tree, git, tmp_path):
    trap = tmp_path / "trap"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/sprung\n")
    trap.chmod(0o755)
    git(tree, "init", "-q")
    git(tree, "config", "core.fsmonitor", str(trap))
    list_files(tree)
    assert not (tmp_path / "sprung").exists()


def test_a_folder_below_the_top_is_listed_by_its_own_paths(tree, git):
    git(tree, "init", "-q")
    assert paths(list_files(tree / "pkg")) == {"a.py", "keep.log"}


def test_a_folder_that_git_ignores_is_listed_when_it_is_asked_for(tree, git):
    git(tree, "init", "-q")
    assert paths(list_files(tree / "build")) == {"out.txt"}


def test_what_cannot_be_read_as_text_is_named_with_its_reason(tree):
    told = reasons(list_files(tree, max_file_bytes=12))
    assert told["data.bin"] == "binary"
    assert told["latin.txt"] == "not UTF-8"
    assert told["link.py"] == told["folder_link"] == "a symbolic link"
    assert told["main.py"] == "larger than 12 bytes"


def test_line_ends_and_empty_files_are_kept_as_they_are(tree):
    texts = {file.path: file.text for file in list_files(tree).files}
    assert texts["dos.txt"] == "one\r\ntwo\r\n"
    assert texts["empty.txt"] == ""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tree):
    os.mkfifo(tree / "pipe")
    assert reasons(list_files(tree))["pipe"] == "a pipe, socket or device"


def test_a_name_that_is_no_text_is_skipped(tree, git):
    try:
        (tree / os.fsdecode(b"bad\xff.py")).write_text("x")
    except OSError:
        pytest.skip("this file system knows only names in UTF-8")
    assert reasons(list_files(tree))["bad?.py"] == "its name is not UTF-8"
    git(tree, "init", "-q")
    assert reasons(list_files(tree))["bad?.py"] == "its name is not UTF-8"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users here")
@pytest.mark.parametrize("inside", ["main.py", "pkg"])
def test_what_may_not_be_read_is_named(tree, monkeypatch, inside):
    monkeypatch.chdir(tree)  # the folders above may be closed to the other user
    (tree / inside).chmod(0)
    tree.chmod(0o755)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)  # who may read everything cannot be refused anything
    try:
        listing = list_files(".")
    finally:
        os.seteuid(was)
        (tree / inside).chmod(0o755)
    assert reasons(listing)[inside] == "cannot be read (Permission denied)"
    assert "dos.txt" in paths(listing)


def test_a_submodule_and_a_clone_inside_are_named_and_not_read(tree, git, write, tmp_path):
    other = tmp_path / "other"
    write(other, {"inner.py": "inner = 1\n"})
    git(other, "init", "-q")
    git(other, "add", "-A")
    git(other, "commit", "-qm", "all")
    git(tree, "init", "-q")
    git(tree, "submodule", "add", "-q", str(other), "sub")
    git(tree, "clone", "-q", str(other), "clone")
    listing = list_files(tree)
    assert {path for path, reason in reasons(listing).items() if "repository of its own" in reason} == {"sub", "clone"}
    assert not any("inner" in path for path in paths(listing))
    assert paths(list_files(tree / "sub")) == {"inner.py"}


def test_a_worktrees_git_file_is_no_source(tree, git, monkeypatch, tmp_path):
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "all")
    git(tree, "worktree", "add", "-q", str(tmp_path / "second"))
    with_git = list_files(tmp_path / "second")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert list_files(tmp_path / "second") == with_git


def test_a_folder_that_became_a_link_is_not_read_through(tree, git, write, tmp_path):
    write(tree, {"d/inside.py": "a = 1\n"})
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    write(tmp_path, {"elsewhere/inside.py": "secret = 1\n"})
    (tree / "d/inside.py").unlink()
    (tree / "d").rmdir()
    (tree / "d").symlink_to(tmp_path / "elsewhere")
    listing = list_files(tree)
    assert "d/inside.py" not in paths(listing)
    assert all("secret" not in file.text for file in listing.files)


def test_files_that_vanish_while_listed_were_never_there(tree, git, monkeypatch):
    from radixkv.repository import files

    git(tree, "init", "-q")
    git(tree, "add", "-A")
    (tree / "main.py").unlink()  # git's index still names it
    listed = files._candidates

    def and_then_one_goes(folder):
        found = list(listed(folder))
        (tree / "pkg/a.py").unlink()
        return iter(found)

    monkeypatch.setattr(files, "_candidates", and_then_one_goes)
    listing = list_files(tree)
    assert paths(listing) == EXPECTED - {"main.py", "pkg/a.py"}
    assert "pkg/a.py" not in reasons(listing)


def test_equal_contents_have_equal_ids_and_others_not(tmp_path, write):
    write(tmp_path, {"a.py": "same", "b.py": "same", "c.py": "other"})
    a, b, c = list_files(tmp_path).files
    assert a.content_id == b.content_id != c.content_id


def test_more_patterns_may_be_excluded(tree):
    listing = list_files(tree, exclude=["*.py", "deep/", "*.txt"])
    assert paths(listing) == {".gitignore", "pkg/keep.log", "uml\u00e4ut name.md"}


def test_a_pattern_that_is_none_is_refused(tree):
    with pytest.raises(ConfigError, match="exclude"):
        list_files(tree, exclude=["!"])


def test_a_pattern_too_long_is_refused_by_name_and_passed_over_in_a_gitignore(tree, caplog):
    long = "a*" * 513
    with pytest.raises(ConfigError, match=r"exclude='a\*a\*.*1,026 characters and the limit is 1,024"):
        list_files(tree, exclude=["*.py", long])
    (tree / ".gitignore").write_text(f"{long}\nmain.py\n")
    assert "main.py" not in paths(list_files(tree))
    assert ".gitignore, line 1 is passed over: it has 1,026 characters" in caplog.text


ENDLESS = [
    "*?" * 500 + "~",
    "*a" * 500 + "b",
    "*a*a*a/" * 100 + "b",
    "**/a/" * 200 + "b",
    "*[!b]" * 190 + "~",
    "**/*/" * 200 + "b",
]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_no_pattern_takes_longer_than_its_length_allows(pattern, tmp_path, write):
    write(tmp_path, {"a" * 255: "a", "a/" * 120 + "a": "a"})  # were one name tried in every way, this would never end
    assert len(list_files(tmp_path, exclude=[pattern]).files) == 2
    write(tmp_path, {".gitignore": pattern})
    assert len(list_files(tmp_path).files) == 3


SEGMENTS = st.text(st.sampled_from(["a", "b", "*", "?", "."]), max_size=4) | st.sampled_from(
    ["**", "[ab]", r"\*", "*[a-b]?", "*"]
)
PATTERNS = st.builds(
    lambda no, parts, end: no + "/".join(parts) + end,
    *[st.sampled_from(["", "", "!", "/"]), st.lists(SEGMENTS, min_size=1, max_size=4), st.sampled_from(["", "/"])],
)
NAMES = st.lists(st.text(st.sampled_from("aab."), min_size=1, max_size=4), min_size=1, max_size=5).map("/".join)


@given(st.lists(PATTERNS, min_size=1, max_size=3), st.lists(NAMES, min_size=1, max_size=6))
def test_a_pattern_matches_what_pathspec_says_it_does(lines, names):
    for line in lines:
        try:
            check_pattern(line)
        except ValueError:
            with pytest.raises(ValueError, match="pattern"):
                GitIgnoreSpec.from_lines([line])
            return
    theirs, ours = GitIgnoreSpec.from_lines(lines, backend="simple"), patterns_of(lines)
    for name in (*names, *(f"{one}/" for one in names)):
        assert ours.check_file(name).include == theirs.check_file(name).include


def test_a_set_of_characters_holds_no_slash_as_for_git(tree, git):
    (tree / ".gitignore").write_text("pkg[!a]a.py\ndeep[+-9]er\n[!a]uild/\n")
    without = list_files(tree)
    git(tree, "init", "-q")
    assert list_files(tree) == without
    assert "pkg/a.py" in paths(without) and "build/out.txt" not in paths(without)


@pytest.mark.parametrize("name", ["nothing", "tree/main.py", "a\0b"])
def test_a_root_that_is_no_folder_is_named(tree, name):
    with pytest.raises(RepositoryError, match="folder"):
        list_files(f"{tree.parent}/{name}")


def test_a_tree_of_too_many_files_is_refused(tree):
    with pytest.raises(RepositoryError, match="the limit is 3"):
        list_files(tree, max_files=3)


def test_git_itself_lists_the_same(tree, git):
    git(tree, "init", "-q")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    told = subprocess.run(command, cwd=tree, check=True, capture_output=True).stdout
    listing = list_files(tree)
    assert {os.fsdecode(path) for path in told.split(b"\0") if path} == paths(listing) | set(reasons(listing))
