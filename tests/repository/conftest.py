"""Helpers of the repository tests: real git, in folders of their own."""

from __future__ import annotations

import subprocess

import pytest


@pytest.fixture
def git():
    """Run git as somebody, at a given time: `git(folder, "commit", "-qam", "edit", at="2024-01-01T00:00:00Z")`."""

    def run(folder, *arguments, at="2024-01-01T00:00:00Z"):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false", "-c", "init.defaultBranch=main"]
        who += ["-c", "protocol.file.allow=always"]
        when = {"GIT_AUTHOR_DATE": at, "GIT_COMMITTER_DATE": at}
        subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, env=_environment() | when)

    return run


@pytest.fixture
def write():
    """Write files, making their folders: `write(root, {"pkg/a.py": "a = 1"})`."""

    def run(root, files):
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return run


def _environment():
    import os

    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
