from __future__ import annotations

from math import inf

import pytest

from radixkv.repository import History, read_history


@pytest.fixture
def tree(tmp_path, git, write):
    root = tmp_path / "tree"
    write(root, {"old.py": "1", "often.py": "1", "pkg/b.py": "1"})
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "all", at="2023-01-01T00:00:00Z")
    for day in range(1, 4):
        write(root, {"often.py": f"edit {day}", "uml\u00e4ut name.md": f"edit {day}"})
        git(root, "add", "-A")
        git(root, "commit", "-qm", "edit", at=f"2024-01-0{day}T00:00:00Z")
    return root


def test_what_changes_often_and_lately_has_the_higher_rate(tree):
    history = read_history(tree)
    assert history.rate("old.py") == history.rate("pkg/b.py") < history.rate("uml\u00e4ut name.md")
    assert history.rate("uml\u00e4ut name.md") < history.rate("often.py")


def test_a_commit_today_counts_as_two_a_month_ago(tree, git, write):
    write(tree, {"new.py": "1"})
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "new", at="2023-01-31T00:00:00Z")
    history = read_history(tree)
    assert history.rate("new.py") == pytest.approx(2 * history.rate("old.py"))


def test_a_commit_leaves_the_rates_of_other_files_as_they_were(tree, git, write):
    before = read_history(tree).rates
    write(tree, {"old.py": "2"})
    git(tree, "commit", "-qam", "edit", at="2026-01-01T00:00:00Z")
    after = read_history(tree).rates
    assert {path for path in after if after[path] != before.get(path)} == {"old.py"}


def test_a_file_in_no_commit_is_new_where_there_are_commits(tree, tmp_path):
    assert read_history(tree).is_new("new.py")
    assert not read_history(tree).is_new("old.py")
    assert not read_history(tmp_path).is_new("new.py")


def test_every_branch_counts_and_every_worktree_reads_the_same(tree, git, write, tmp_path):
    git(tree, "worktree", "add", "-q", "-b", "feature", str(tmp_path / "second"))
    write(tmp_path / "second", {"pkg/b.py": "2"})
    git(tmp_path / "second", "commit", "-qam", "on a branch", at="2024-02-01T00:00:00Z")
    assert read_history(tree) == read_history(tmp_path / "second")
    assert read_history(tree).rate("pkg/b.py") > read_history(tree).rate("old.py")


def test_below_the_top_paths_are_those_of_the_folder(tree):
    assert set(read_history(tree / "pkg").rates) == {"b.py"}


def test_where_there_is_no_history_no_file_is_likelier_than_another(tmp_path, git):
    assert read_history(tmp_path) == History()
    git(tmp_path, "init", "-q")
    assert read_history(tmp_path) == History()
    assert read_history(tmp_path / "nothing") == History()
    assert History().rate("a.py") == History().rate("b.py") == History().mean(["a.py"]) == History().mean([])


def test_a_clock_far_ahead_does_not_overflow(tree, git, write):
    write(tree, {"old.py": "2"})
    git(tree, "commit", "-qam", "future", at="2099-01-01T00:00:00Z")
    assert read_history(tree).rate("often.py") < read_history(tree).rate("old.py") < inf
