"""The command line's `replay`: traces in; hit rates, what they are worth, and plots out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from radixkv.errors import ConfigError
from radixkv.policies import POLICIES
from radixkv.replay.capacity import capacity_pages, split_list
from radixkv.replay.cost import UTILISATION, named_gpu, named_shape
from radixkv.replay.curve import lru_curve
from radixkv.replay.html import render_html
from radixkv.replay.optimum import optimum
from radixkv.replay.plot import load_matplotlib, write_png
from radixkv.replay.report import Report
from radixkv.replay.reuse import Reuse
from radixkv.replay.simulate import simulate
from radixkv.replay.workload import Workload

__all__ = ["replay"]

_INTERRUPTED = 130  # what a shell reports for Ctrl-C


def replay(
    traces: Annotated[list[Path], typer.Argument(help="Trace files: Mooncake, Qwen-Bailian or triedelta-1; gzip or plain.")],
    capacity: Annotated[
        list[str] | None,
        typer.Option(
            "--capacity",
            "-c",
            help="3014p (pages), 2Mt (tokens), 40GB or 40GiB (of KV), 5% (of all distinct pages); a "
            "comma list, or repeated.",
            show_default="1%,2%,5%,10%,20%,30%,50%",
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            help=f"{', '.join(sorted(POLICIES))}, or min, the offline optimum; a comma list, or repeated.",
            show_default="lru,min",
        ),
    ] = None,
    page_size: Annotated[
        int | None, typer.Option(help="Tokens in a page.", min=1, show_default="the trace's block size")
    ] = None,
    model: Annotated[str, typer.Option(help="Model shape to count savings and bytes on.")] = "llama-3.1-8b",
    gpu: Annotated[str, typer.Option(help="GPU to count savings on.")] = "h100",
    utilisation: Annotated[float, typer.Option(help="Assumed share of the GPU's peak that prefill reaches.")] = UTILISATION,
    limit: Annotated[int | None, typer.Option(help="Replay so many requests only.", min=1)] = None,
    share: Annotated[bool, typer.Option("--share", help="Equal block ids of different files mean equal prefixes.")] = False,
    block_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a trace's block, where its format does not say.", min=1)
    ] = None,
    tag_accuracy: Annotated[
        float | None,
        typer.Option(
            help="Tag each request with whether it will be continued, right with this probability; for auto, which "
            "learns from tags.",
            min=0.0,
            max=1.0,
            show_default="no tags",
        ),
    ] = None,
    tag_seed: Annotated[int, typer.Option(help="Which tags are wrong.", min=0)] = 0,
    check_every: Annotated[
        int, typer.Option(help="Recount the cache's invariants after so many requests; 0: at the end only.", min=0)
    ] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of the table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG plot here; needs matplotlib.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.")] = None,
) -> None:
    """Replay request traces through the cache: hit rates by capacity and policy, and what they are worth."""
    policies = _policies(policy)
    capacities = split_list(capacity or ["1%,2%,5%,10%,20%,30%,50%"])
    shape, peak = named_shape(model), named_gpu(gpu)
    peak.seconds(0, utilisation)
    _require_outputs(plot, html)
    with _Bars() as bars, _loading(bars, traces, page_size, share, block_tokens, limit) as workload:
        sizes = {
            label: capacity_pages(
                label,
                page_size=workload.page_size,
                footprint_pages=workload.num_pages,
                bytes_per_token=shape.kv_bytes_per_token,
            )
            for label in capacities
        }
        with bars.task("last uses", workload.num_requests) as advance:
            reuse = Reuse.of(workload, advance)
        names = [path.name for path in traces]
        report = Report(names, workload, lru_curve(workload, reuse), model, shape, gpu, peak, utilisation)
        report.tag_accuracy = tag_accuracy
        tags = None if tag_accuracy is None else reuse.hints(workload.lengths, tag_accuracy, tag_seed)
        _fill(report, reuse, bars, sizes, policies, check_every, tags)
    _write(report, as_json, plot, html)
    if not report.complete:
        raise typer.Exit(_INTERRUPTED)


def _fill(
    report: Report,
    reuse: Reuse,
    bars: _Bars,
    sizes: dict[str, int],
    policies: Sequence[str],
    check_every: int,
    tags: list[int] | None,
) -> None:
    """Replay every policy at every capacity; Ctrl-C keeps the rows there are."""
    workload = report.workload
    try:
        for label, pages in sizes.items():
            for policy in policies:
                with bars.task(f"{policy} at {label}", workload.num_requests) as advance:
                    if policy == "min":
                        row = optimum(workload, reuse, pages)
                    else:
                        row = simulate(
                            workload,
                            policy,
                            pages,
                            check_every=check_every,
                            tags=None if tags is None else tags.__getitem__,
                            on_requests=advance,
                        )
                report.results.append((label, row))
    except KeyboardInterrupt:
        report.complete = False


def _policies(given: Sequence[str] | None) -> list[str]:
    names = split_list(given or ["lru,min"])
    for name in names:
        if name != "min" and name not in POLICIES:
            raise ConfigError("policy", name, f"one of {', '.join([*sorted(POLICIES), 'min'])}")
    return names


def _require_outputs(plot: Path | None, html: Path | None) -> None:
    """Fail before the replay, not after it."""
    if plot is not None:
        load_matplotlib()
    for path in (plot, html):
        if path is not None and not path.resolve().parent.is_dir():
            raise ConfigError("output", str(path), "a file in a folder that exists")


@contextmanager
def _loading(
    bars: _Bars,
    traces: Sequence[Path],
    page_size: int | None,
    share: bool,
    block_tokens: int | None,
    limit: int | None,
) -> Iterator[Workload]:
    """The workload, read under a progress bar, and closed at the end."""
    num_bytes = sum(path.stat().st_size for path in traces if path.is_file())
    with bars.task("reading", num_bytes) as advance:
        workload = Workload.load(
            traces, page_size=page_size, share=share, block_tokens=block_tokens, limit=limit, on_bytes=advance
        )
    with workload:
        yield workload


def _write(report: Report, as_json: bool, plot: Path | None, html: Path | None) -> None:
    console, notes = Console(width=None if sys.stdout.isatty() else 160), Console(stderr=True)
    if as_json:
        sys.stdout.write(json.dumps(report.as_json(), indent=2) + "\n")
    else:
        console.print(report.table())
    if not report.complete:
        notes.print("interrupted: rows are missing")
    if plot is not None:
        write_png(report, plot)
        notes.print(f"wrote {plot}", soft_wrap=True, highlight=False)
    if html is not None:
        html.write_text(render_html(report), encoding="utf-8")
        notes.print(f"wrote {html}", soft_wrap=True, highlight=False)


class _Bars(Progress):
    """Progress bars on stderr, one task at a time, gone when done; silent where stderr is not a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar for one step; gives what moves it on."""
        task = self.add_task(name, total=total)

        def advance(step: int) -> None:
            self.advance(task, step)

        try:
            yield advance
        finally:
            self.remove_task(task)
