"""The command line: radixkv chat | demo | repo | replay | top | model fetch. Needs the `cli` extra; some need more."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, NoReturn

from radixkv import __version__
from radixkv.errors import RadixKVError

try:
    import typer
    from rich.logging import RichHandler
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from radixkv.replay.cli import replay
    from radixkv.repo_cli import repo
    from radixkv.terminal import err, one_turn, out, rewind, show_error, typed_lines
    from radixkv.top import top
except ImportError as missing:
    sys.exit(f"radixkv's command line needs the package {missing.name!r}: pip install 'radixkv[engine]'")

if TYPE_CHECKING:
    from radixkv.engine import Engine, SamplingParams, Session

__all__ = ["app", "chat", "demo", "fetch", "main"]

app = typer.Typer(
    name="radixkv",
    help="Reuse the attention KV of prompts you have already computed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
model_app = typer.Typer(help="Get models.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.command("replay")(replay)
app.command("repo")(repo)
app.command("top")(top)
for command in entry_points(group="radixkv.commands"):  # of packages above this one, such as the service's `serve`
    app.command(command.name)(command.load())

ModelOption = Annotated[str, typer.Argument(help="A name (smollm2), a folder, a .gguf file or a hub id.")]

_CHAT_HELP = """\
/rewind [n]   undo the last n turns       /tree    draw what is cached
/system TEXT  start anew with a system message    /stats   the cache's counts
/help         this                        /exit    leave (or Ctrl-D)"""


def main() -> None:
    """Run the command line; errors of radixkv are one line, not a traceback."""
    try:
        app()
    except RadixKVError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    show_error(message)
    raise SystemExit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"radixkv {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Settings of all commands."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)])
    if not verbose:
        logging.getLogger("httpx").setLevel(logging.WARNING)


@model_app.command("fetch")
def fetch(
    model: Annotated[str, typer.Argument(help="smollm2, or a hub id.")] = "smollm2",
) -> None:
    """Download a model into the cache folder and make it ready; resumes where it was interrupted."""
    from radixkv.engine.models import resolve_model

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    ) as progress:
        task = progress.add_task(model, total=None)

        def show(stage: str, done: int, total: int) -> None:
            progress.update(task, description=f"{model}: {stage}", completed=done, total=total or None)

        folder = resolve_model(model, progress=show, in_pages=True)  # whoever runs it may have a GPU
    out.print(str(folder.path), soft_wrap=True)


@app.command()
def demo(
    model: ModelOption = "smollm2",
    questions: Annotated[int, typer.Option(help="Repository questions, 2 to 5.", min=2, max=5)] = 4,
    turns: Annotated[int, typer.Option(help="Chat turns, 2 to 5.", min=2, max=5)] = 4,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=1, max=256)] = 24,
) -> None:
    """Show the main job: a chat and repository questions, with the cache off and on, and check that both answer alike."""
    from radixkv.demo import run_demo

    raise SystemExit(run_demo(model, out, num_turns=turns, num_questions=questions, max_tokens=max_tokens))


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="As for demo; with --url, one of the server's names.", show_default="smollm2")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Chat with the server there, and load no model here.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="RADIXKV_API_KEY", help="With --url: a key, if the server wants one.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that sum to this.", min=0, max=1)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawn answers repeatable.")] = None,
    exact: Annotated[bool, typer.Option(help="A hit answers bit for bit as a miss; slower.")] = False,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Reuse prefixes.")] = True,
) -> None:
    """Chat in the terminal; after each turn, see how many tokens were skipped and the time that saved."""
    if url is not None:
        from radixkv.remote_cli import chat_remote

        if exact or not cache:
            _fail("--exact and --no-cache are the server's to set; leave them out beside --url")
        fields = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        chat_remote(url, api_key, model, system, {name: value for name, value in fields.items() if value is not None})
        return
    from radixkv.engine import Engine, SamplingParams

    model = model or "smollm2"
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with err.status(f"loading {model} ..."):
        engine = Engine(model, exact=exact, cache=cache)
    with engine:
        out.print(f"[bold]{escape(engine.name)}[/]; /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves")
        _converse(engine, engine.chat(system), params)


def _converse(engine: Engine, session: Session, params: SamplingParams) -> None:
    for text in typed_lines():
        with one_turn(RadixKVError, "this turn is undone, what it computed stays cached"):
            if text.startswith("/"):
                session = _command(engine, session, text)
            else:
                _turn(engine, session, text, params)


def _turn(engine: Engine, session: Session, text: str, params: SamplingParams) -> None:
    """One streamed answer and the line of numbers under it."""
    rate = engine.stats().prefill_tokens_per_s
    for chunk in session.stream(text, params):
        out.print(chunk.text, end="", markup=False, soft_wrap=True)
        done = chunk.completion
    out.print()
    assert done is not None
    rate = rate or engine.stats().prefill_tokens_per_s
    saved = f", saved about {done.cached_tokens / rate:.2f} s" if done.cached_tokens and rate else ""
    out.print(
        f"[dim]prompt {done.prompt_tokens} tokens: {done.cached_tokens} skipped, {done.computed_tokens} computed{saved}; "
        f"first token {done.ttft_s * 1e3:.0f} ms, then {done.decode_tokens_per_s:.0f} tokens/s[/]"
    )


def _command(engine: Engine, session: Session, text: str) -> Session:
    name, _, rest = text.partition(" ")
    if name == "/rewind":
        rewind(session, rest.strip())
    elif name == "/system":
        session.close()
        return engine.chat(rest or None)
    elif name == "/tree":
        out.print(engine.cache.show(), markup=False, soft_wrap=True)
    elif name == "/stats":
        out.print(str(engine.cache.stats()), markup=False)
    else:
        out.print(_CHAT_HELP, markup=False)
    return session


if __name__ == "__main__":
    main()
