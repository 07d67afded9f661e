"""The command line's `repo`: questions about a source tree, asked in a loop, from options or from a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from radixkv.errors import RadixKVError
from radixkv.terminal import err, one_turn, out, typed_lines

if TYPE_CHECKING:
    from radixkv.engine import Repository, SamplingParams

__all__ = ["repo"]

_SHOWN = 8  # files named one by one


def repo(
    path: Annotated[Path, typer.Argument(help="The source tree.", exists=True, file_okay=False)],
    model: Annotated[str, typer.Option(help="A name (smollm2), a folder, a .gguf file or a hub id.")] = "smollm2",
    question: Annotated[list[str] | None, typer.Option("--question", "-q", help="Ask this; may be repeated.")] = None,
    questions: Annotated[Path | None, typer.Option(help="Ask every line of this file.", exists=True, dir_okay=False)] = None,
    budget: Annotated[
        int | None, typer.Option(help="Tokens that all files together may have.", min=1, show_default="what the model holds")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave out what matches, written as in a .gitignore; may be repeated.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
) -> None:
    """Ask questions about a source tree; its files are computed once, and again only from the first changed one on."""
    from radixkv.engine import Engine, SamplingParams

    params = SamplingParams(max_tokens=max_tokens)
    with err.status(f"loading {model} ..."):
        engine = Engine(model)
    with engine:
        tree = engine.repository(path, budget_tokens=budget, exclude=exclude or ())
        out.print(f"[bold]{escape(str(path))}[/]: {len(tree.packing.files)} files, {tree.packing.num_tokens:,} tokens")
        for one in tree.skipped[:_SHOWN]:
            out.print(f"[dim]left out {escape(one.path)}: {escape(one.reason)}[/]", soft_wrap=True)
        if len(tree.skipped) > _SHOWN:
            out.print(f"[dim]left out {len(tree.skipped) - _SHOWN:,} more files[/]")
        for text in _asked(question or [], questions):
            with one_turn(RadixKVError, "what it computed stays cached"):
                _show_files(tree) if text == "/files" else _answer(tree, text, params)


def _asked(given: list[str], file: Path | None) -> Iterator[str]:
    """The questions of the options and the file, or else what is typed until Ctrl-D."""
    lines = file.read_text("utf-8", "replace").splitlines() if file is not None else []
    asked = [*given, *(line for line in lines if line.strip())]
    if asked:
        for text in asked:
            out.print(f"[bold green]> {escape(text)}[/]")
            yield text
        return
    out.print("[dim]/files lists them in order, Ctrl-C stops an answer, /exit or Ctrl-D leaves[/]")
    yield from typed_lines()


def _answer(tree: Repository, text: str, params: SamplingParams) -> None:
    """Read the tree again, answer, and say what it cost."""
    for path in tree.refresh():
        out.print(f"[dim]changed: {escape(path)}[/]", soft_wrap=True)
    for chunk in tree.stream(text, params):
        out.print(chunk.text, end="", markup=False, soft_wrap=True)
        done = chunk.completion
    out.print()
    assert done is not None
    out.print(
        f"[dim]prompt {done.prompt_tokens:,} tokens: {done.cached_tokens:,} skipped, {done.computed_tokens:,} computed; "
        f"first token {done.ttft_s:.2f} s, then {done.decode_tokens_per_s:.0f} tokens/s[/]"
    )
    costs = tree.computed(done.cached_tokens)
    for cost in costs[:_SHOWN]:
        out.print(f"[dim]  computed {cost.computed_tokens:,} of {cost.num_tokens:,} tokens of {escape(cost.path)}[/]")
    if len(costs) > _SHOWN:
        rest = sum(cost.computed_tokens for cost in costs[_SHOWN:])
        out.print(f"[dim]  and {rest:,} tokens of {len(costs) - _SHOWN} more files[/]")


def _show_files(tree: Repository) -> None:
    for file in tree.packing.files:
        out.print(f"[dim]{file.start:9,} {len(file.tokens):8,}  {escape(file.path)}[/]", soft_wrap=True)
