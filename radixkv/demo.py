"""`radixkv demo`: the main job on real input, with the cache off and on.

    chat         a long system prompt, several turns; each turn resends the whole history
    repository   a standard-library package packed as one context, several questions about it

Everything is run twice, in exact mode, and the answers are compared token by token.
"""

from __future__ import annotations

import json
import json.decoder
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

from rich.console import Console
from rich.table import Table

from radixkv.engine import Completion, Engine, SamplingParams

__all__ = ["run_demo"]

_TURNS = (
    "What does the with statement do?",
    "Which methods does a context manager need?",
    "When is __exit__ called?",
    "What happens when __exit__ returns a true value?",
    "Thank you. Name one use for it.",
)
_QUESTIONS = (
    "Which exception is raised for invalid JSON?",
    "What does py_scanstring return?",
    "Which class decodes a JSON document?",
    "What does raw_decode return?",
    "Which characters count as whitespace?",
)
_CONTEXT_BYTES = 18_000  # of source; some 5,000 tokens


@dataclass(frozen=True, slots=True)
class _Row:
    """One question, asked with the cache off and on."""

    part: str
    question: str
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    ttft_off_s: float
    ttft_on_s: float
    same_answer: bool

    @property
    def speedup(self) -> float:
        return self.ttft_off_s / self.ttft_on_s


def run_demo(model: str, out: Console, *, num_turns: int, num_questions: int, max_tokens: int) -> int:
    """Run it, print it, and end with one line of JSON; returns the exit code: 0 if on and off answered alike."""
    params = SamplingParams(max_tokens=max_tokens)
    with out.status(f"loading {model} ..."):
        engine = Engine(model, exact=True, pool_bytes=1 << 30)
    with engine:
        out.print(f"[bold]{engine.name}[/], exact mode: a hit answers bit for bit as a miss\n")
        rows = _paired(out, "chat", _TURNS[:num_turns], _chat(engine, params, False), _chat(engine, params, True), num_turns)
        prompts = _repository_prompts(_QUESTIONS[:num_questions])
        off = _repository(engine, prompts, params, cache=False)
        rows += _paired(out, "repository", _QUESTIONS, off, _repository(engine, prompts, params, cache=True), num_questions)
        _report(out, engine, rows)
    same = all(row.same_answer for row in rows)
    asked = [row for row in rows if row.part == "repository"]
    hits = [row for row in asked if row.cached_tokens] or asked
    summary = {
        "same_answers": same,
        "speedup": round(
            statistics.median(row.ttft_off_s for row in hits) / statistics.median(row.ttft_on_s for row in hits), 2
        ),
        "cached_tokens": sum(row.cached_tokens for row in rows),
        "prompt_tokens": sum(row.prompt_tokens for row in rows),
        "rows": [{**asdict(row), "speedup": round(row.speedup, 2)} for row in rows],
    }
    print(json.dumps(summary), flush=True)
    return 0 if same else 1


def _paired(
    out: Console,
    part: str,
    questions: tuple[str, ...],
    off: Iterator[Completion],
    on: Iterator[Completion],
    count: int,
) -> list[_Row]:
    """Ask everything with the cache off, then with it on; print each answer as it comes."""
    with out.status("") as status:
        cold: list[Completion] = []
        for index in range(count):
            status.update(f"{part}, cache off: {index + 1} of {count}")
            cold.append(next(off))
        rows = []
        for index, (question, miss) in enumerate(zip(questions, cold, strict=False)):
            status.update(f"{part}, cache on: {index + 1} of {count}")
            hit = next(on)
            out.print(f"[bold green]{part} {index + 1}[/] {question}")
            out.print(f"  {hit.text.strip()}", markup=False)
            out.print(
                f"  [dim]{hit.prompt_tokens} prompt tokens, {hit.cached_tokens} skipped: "
                f"first token {miss.ttft_s:.2f} s -> {hit.ttft_s:.2f} s[/]"
            )
            same = miss.token_ids == hit.token_ids
            rows.append(
                _Row(
                    part,
                    question,
                    hit.prompt_tokens,
                    hit.cached_tokens,
                    hit.computed_tokens,
                    round(miss.ttft_s, 4),
                    round(hit.ttft_s, 4),
                    same,
                )
            )
    out.print()
    return rows


def _chat(engine: Engine, params: SamplingParams, cache: bool) -> Iterator[Completion]:
    system = "You are a helpful assistant for Python. Answer in one sentence, from this reference.\n\n"
    with engine.chat(system + topics["with"] + topics["context-managers"], cache=cache) as session:
        for turn in _TURNS:
            yield session.send(turn, params)


def _repository_prompts(questions: tuple[str, ...]) -> list[list[dict[str, str]]]:
    """One prompt a question, over one context: source files of the package json, whole files first."""
    folder = Path(json.decoder.__file__).parent
    parts, left = [], _CONTEXT_BYTES
    for path in (folder / "scanner.py", folder / "decoder.py", folder / "tool.py", folder / "__init__.py"):
        source = path.read_text(encoding="utf-8")[:left]
        left -= len(source)
        parts.append(f"# file: json/{path.name}\n{source}")
    context = "Here is the source of a Python package.\n\n" + "\n\n".join(parts)
    return [[{"role": "user", "content": f"{context}\n\nQuestion: {question} Answer briefly."}] for question in questions]


def _repository(
    engine: Engine, prompts: list[list[dict[str, str]]], params: SamplingParams, *, cache: bool
) -> Iterator[Completion]:
    for prompt in prompts:
        yield engine.generate([prompt], params, cache=cache)[0]


def _report(out: Console, engine: Engine, rows: list[_Row]) -> None:
    table = Table("", "prompt", "cached", "computed", "first token off", "on", "speed-up", "same answer")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row.part,
            f"{row.prompt_tokens:,}",
            f"{row.cached_tokens:,}",
            f"{row.computed_tokens:,}",
            f"{row.ttft_off_s * 1e3:,.0f} ms",
            f"{row.ttft_on_s * 1e3:,.0f} ms",
            f"{row.speedup:.1f}x",
            "yes" if row.same_answer else "NO",
        )
    out.print(table)
    out.print("\nThe tree, one edge a line:")
    out.print(engine.cache.show(max_nodes=24), markup=False, soft_wrap=True)
    stats = engine.cache.stats()
    used = stats.num_pages - stats.num_free
    out.print(
        f"\nPool: {used:,} of {stats.num_pages:,} pages of {stats.page_size} tokens hold KV, "
        f"{used * engine.store.shape.page_bytes / 1e6:,.0f} MB; hit rate {stats.hit_rate:.0%} of looked-up tokens."
    )
    if all(row.same_answer for row in rows):
        out.print(f"Cache off and on gave the same answers, token for token, in all {len(rows)} cases.\n")
    else:
        out.print("[bold red]Cache off and on gave different answers; that is a defect.[/]\n")
