"""The command line as a person uses it: real processes, real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.model


def radixkv(*arguments: str, stdin: str = "", timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "radixkv", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "COLUMNS": "160", "NO_COLOR": "1"},
    )


def test_help_names_every_command():
    done = radixkv("--help")
    assert done.returncode == 0
    for command in ("chat", "demo", "model", "repo", "replay", "serve", "top"):
        assert command in done.stdout


def test_a_chat_shows_what_each_turn_skipped_and_saved(smollm2):
    done = radixkv(
        "chat",
        "--system",
        "You are a helpful assistant.",
        "--max-tokens",
        "16",
        stdin="What is the capital of France?\nAnd of Italy?\n/tree\n/stats\n/rewind\n/help\n/exit\n",
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert " 0 skipped" in done.stdout
    assert "32 skipped" in done.stdout
    assert "saved about" in done.stdout
    assert "pages" in done.stdout
    assert "1 turns left" in done.stdout


def test_a_model_that_is_not_there_is_one_clear_line():
    done = radixkv("chat", "/no/such/folder")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "/no/such/folder" in done.stderr


def test_the_demo_answers_alike_with_the_cache_off_and_on(smollm2):
    done = radixkv("demo", "--turns", "2", "--questions", "2", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["same_answers"] is True
    assert last["cached_tokens"] > 1000
    assert len(last["rows"]) == 4
    assert {row["part"] for row in last["rows"]} == {"chat", "repository"}
    assert all(row["cached_tokens"] + row["computed_tokens"] == row["prompt_tokens"] for row in last["rows"])


def test_model_fetch_prints_the_folder(smollm2):
    done = radixkv("model", "fetch", "smollm2")
    assert done.returncode == 0
    assert done.stdout.strip() == str(smollm2.path)
