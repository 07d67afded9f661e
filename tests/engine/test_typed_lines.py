"""A conversation on a terminal: what counts as a line, what ends a turn, what ends the conversation."""

from __future__ import annotations

import io
import sys

import pytest

from radixkv.remote_cli import Conversation
from radixkv.terminal import one_turn, rewind, typed_lines
from radixkv_client import Client


@pytest.fixture
def typed(monkeypatch):
    """Lines as they come from a pipe: `typed("a\\n")` is what the commands would be asked."""

    def run(text: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return list(typed_lines())

    return run


@pytest.mark.parametrize("last", ["/exit\nnever\n", "  /quit  \nnever\n", ""])
def test_lines_come_without_white_space_and_end_where_the_person_leaves(typed, last):
    assert typed("  one \n\n \t \n/two 2\n" + last) == ["one", "/two 2"]


def test_ctrl_c_where_nothing_runs_leaves(monkeypatch):
    class Interrupted(io.StringIO):
        def readline(self, *_):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    assert list(typed_lines()) == []


def test_ctrl_c_and_errors_of_its_kind_end_a_turn_and_nothing_else(capsys):
    with one_turn(ValueError, "what was said is undone"):
        raise KeyboardInterrupt
    assert "stopped; what was said is undone" in capsys.readouterr().out
    with one_turn(ValueError, ""):
        raise ValueError("[bold]5[/] is too many")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "error: [bold]5[/] is too many\n")
    with pytest.raises(KeyError), one_turn(ValueError, ""):
        raise KeyError("5")


@pytest.mark.parametrize("count", ["x", "-1", "1.5", "²", "٣", "1 2", "9" * 5000])
def test_a_rewind_by_what_is_no_number_of_turns_only_says_so(capsys, count):
    with Client("http://127.0.0.1:9") as nobody:
        rewind(Conversation(nobody, {}), count)
    assert capsys.readouterr().out == "/rewind takes a number of turns\n"


@pytest.mark.parametrize("count", ["", "0", "1", "999999999"])
def test_a_rewind_by_a_number_says_how_many_turns_are_left(capsys, count):
    with Client("http://127.0.0.1:9") as nobody:
        rewind(Conversation(nobody, {}), count)
    assert capsys.readouterr().out == "0 turns left\n"
