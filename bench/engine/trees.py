"""Questions about real source trees while they are edited. `python -m bench.engine.trees`; some four minutes on two cores.

orders    no model: sessions of edits to asyncio and email (some 100,000 tokens each), in which order how many tokens of the
          prompt lie behind what any earlier prompt begins with
questions the same packages under a budget of 20,000 tokens, in a git repository with dated commits: a question after an
          edit, a commit, a new file, a branch. Beside it: the files in the order of their paths, and the cache off

The model of `questions` has random weights and SmolLM2's tokenizer: models small enough for two cores have shorter contexts.
Its times say how tokens turn into time there, not what a real model takes.
"""

from __future__ import annotations

import argparse
import asyncio
import email
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

from transformers import LlamaConfig

from bench.common import save, table
from radixkv.engine import Engine, Repository, SamplingParams
from radixkv.engine.models import resolve_model
from radixkv.engine.tokenizer import Tokenizer
from radixkv.prefix import common_prefix_bytes
from radixkv.repository import History, Listing, Packing, SourceFile, list_files
from radixkv.tokens import Tokens

TREES = (asyncio, email)
EDITS, SEEDS, BUDGET = 40, 3, 20_000
ASK = SamplingParams(max_tokens=1)
SHAPE = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=49_152,
    max_position_embeddings=32_768,
)


# -- orders ------------------------------------------------------------------------------------------------------------


def orders(module: ModuleType, tokenizer: Tokenizer, session: str, seed: int) -> dict[str, float]:
    """Share of the prompt computed after an edit, mean over a session, for each rule of order."""
    files = {file.path: file.text for file in list_files(Path(module.__file__).parent, exclude=["__pycache__"]).files}
    edited = list(edits(sorted(files), session, random.Random(seed)))
    rules: dict[str, Callable[[Listing, list[Packing]], list[SourceFile]]] = {
        "by path": lambda listing, past: list(listing.files),
        "first order": lambda listing, past: by_packing(listing, past[:1]),
        "edited last": moved_to_the_end(),
        "radixkv": lambda listing, past: by_packing(listing, past[-1:]),
    }
    return {name: replay(dict(files), edited, rule, tokenizer, random.Random(seed)) for name, rule in rules.items()}


def edits(paths: list[str], session: str, rng: random.Random) -> Iterator[str]:
    """Paths in the order of their edits."""
    ranked = rng.sample(paths, len(paths))
    for number in range(EDITS):
        if session == "task":  # three files at a time, one edit of seven elsewhere
            if number % 13 == 0:
                ranked = rng.sample(paths, len(paths))
            yield rng.choice(ranked[:3] if rng.random() < 6 / 7 else paths)
        elif session == "even":
            yield rng.choice(paths)
        else:  # the k-th file is edited once for k edits of the first
            yield rng.choices(ranked, [1 / (place + 1) for place in range(len(ranked))])[0]


def replay(
    files: dict[str, str],
    edited: list[str],
    rule: Callable[[Listing, list[Packing]], list[SourceFile]],
    tokenizer: Tokenizer,
    rng: random.Random,
) -> float:
    """Edit, order, and count what no earlier prompt begins with."""
    known: dict[str, Tokens] = {}

    def tokenize(file: SourceFile) -> Tokens:
        if file.content_id not in known:
            known[file.content_id] = Tokens(tokenizer.encode(file.text, special=False, bos=False))
        return known[file.content_id]

    past: list[Packing] = []
    prompts: list[bytes] = []
    shares = []
    for path in ["", *edited]:
        if path:
            lines = files[path].splitlines(keepends=True)
            lines.insert(rng.randrange(len(lines) + 1), f"# edit {len(prompts)}\n")
            files[path] = "".join(lines)
        listing = Listing(tuple(SourceFile(name, digest(files[name]), files[name]) for name in sorted(files)), ())
        past.append(Packing.of(listing, 10**9, tokenize, history=History(), last=past[-1] if past else None, known=past))
        prompt = b"".join(tokenize(file).data for file in rule(listing, past))
        if path:
            shares.append(1 - max(common_prefix(prompt, other) for other in prompts) / (len(prompt) // 4))
        prompts.append(prompt)
    return fmean(shares)


def digest(text: str) -> str:
    """Equal for equal texts."""
    return blake2b(text.encode(), digest_size=16).hexdigest()


def by_packing(listing: Listing, packings: list[Packing]) -> list[SourceFile]:
    """The files as a packing has them."""
    place = {file.path: number for number, file in enumerate(packings[0].files)}
    return sorted(listing.files, key=lambda file: place[file.path])


def moved_to_the_end() -> Callable[[Listing, list[Packing]], list[SourceFile]]:
    """Every edited file goes to the very end."""
    last: dict[str, tuple[int, str]] = {}

    def rule(listing: Listing, past: list[Packing]) -> list[SourceFile]:
        first = {file.path: number for number, file in enumerate(past[0].files)}
        for file in listing.files:
            if file.path not in last or last[file.path][1] != file.content_id:
                last[file.path] = (len(past) * 1000 + first[file.path], file.content_id)
        return sorted(listing.files, key=lambda file: last[file.path][0])

    return rule


def common_prefix(one: bytes, other: bytes) -> int:
    """How many first tokens are equal."""
    return common_prefix_bytes(one, 0, other) // 4


# -- questions ---------------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str, day: int = 0) -> None:
    """Run git as somebody, on some day of 2024."""
    at = f"2024-{1 + day // 28:02}-{1 + day % 28:02}T00:00:00Z"
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_AUTHOR_DATE": at, "GIT_COMMITTER_DATE": at}
    who = ["-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "commit.gpgsign=false"]
    who += ["-c", "init.defaultBranch=main"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, env=env)


class Work:
    """A copy of a package in a git repository, where three files are worked on."""

    def __init__(self, module: ModuleType, folder: Path) -> None:
        self.root = folder / module.__name__
        shutil.copytree(Path(module.__file__).parent, self.root, ignore=shutil.ignore_patterns("__pycache__"))
        self.day = 0
        self._edits = 0
        git(self.root, "init", "-q")
        self.commit()
        rng = random.Random(0)
        paths = sorted(path for path in self.root.glob("*.py") if 2_000 < path.stat().st_size < 9_000)
        self.hot = rng.sample(paths, 3)
        for _ in range(20):
            self.edit(rng.choice(self.hot) if rng.random() < 0.7 else rng.choice(paths))
            self.commit()

    def edit(self, path: Path) -> None:
        """Insert a line in the middle."""
        self._edits += 1
        lines = path.read_text("utf-8").splitlines(keepends=True)
        lines.insert(len(lines) // 2, f"# edit {self._edits}\n")
        path.write_text("".join(lines), "utf-8")

    def commit(self) -> None:
        """Commit everything, three days later."""
        self.day += 3
        git(self.root, "add", "-A")
        git(self.root, "commit", "-qm", "work", day=self.day)

    def steps(self) -> Iterator[tuple[str, Path]]:
        """Do something to the tree; say what, and which folder the question is about."""
        yield "first question", self.root
        yield "another question", self.root
        self.edit(self.hot[0])
        yield "edit of a file often changed", self.root
        self.commit()
        yield "its commit", self.root
        cold = sorted(
            path for path in self.root.glob("*.py") if path not in self.hot and 1_000 < path.stat().st_size < 9_000
        )[1]
        self.edit(cold)
        yield "edit of a file rarely changed", self.root
        self.edit(cold)
        yield "edit of the same file again", self.root
        (self.root / "added.py").write_text("# a new file\n" * 40)
        self.commit()
        yield "commit that adds a file", self.root
        git(self.root, "checkout", "-qb", "feature")
        self.edit(self.hot[1])
        self.edit(self.hot[2])
        self.commit()
        yield "branch with two files changed", self.root
        git(self.root, "checkout", "-q", "main")
        yield "back to main", self.root
        git(self.root, "worktree", "add", "-q", str(self.root.parent / "second"), "feature")
        yield "worktree of the branch, just opened", self.root.parent / "second"


def questions(module: ModuleType, engine: Engine, kind: str) -> list[dict[str, Any]]:
    """Every step, with a question after it."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trees: dict[Path, Repository] = {}
        for number, (step, root) in enumerate(Work(module, Path(folder)).steps()):
            if root not in trees:
                trees[root] = engine.repository(root, BUDGET, namespace=f"{module.__name__} {kind}")
            tree = trees[root]
            tree.refresh()
            prompt = tree.prompt(f"Question {number}: what does the function at the end do?")
            if kind == "by path":
                prompt = sorted_by_path(tree, prompt)
            done = engine.generate(prompt, ASK, namespace=tree.namespace, cache=kind != "cache off")[0]
            rows.append(
                {
                    "step": step,
                    "engine": kind,
                    "tree": module.__name__,
                    "files": len(tree.packing.files),
                    "prompt_tokens": done.prompt_tokens,
                    "computed_tokens": done.computed_tokens,
                    "ttft_s": done.ttft_s,
                    "answer": done.token_ids,
                }
            )
    return rows


def sorted_by_path(tree: Repository, prompt: Tokens) -> Tokens:
    """The same prompt with its files in the order of their paths."""
    packing = tree.packing
    head = len(prompt) - packing.num_tokens
    start = next(at for at in range(head + 1) if prompt[at : at + packing.num_tokens] == packing.tokens)
    files = b"".join(file.tokens.data for file in sorted(packing.files, key=lambda file: file.path))
    return Tokens(prompt[:start].data + files + prompt[start + packing.num_tokens :].data)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["orders", "questions"], help="only this one")
    part = parser.parse_args().part
    tokenizer = Tokenizer(resolve_model("smollm2").path)
    if part != "questions":
        rows: list[dict[str, Any]] = []
        for session in ("task", "zipf", "even"):
            for module in TREES:
                runs = [orders(module, tokenizer, session, seed) for seed in range(SEEDS)]
                shares = {name: fmean(one[name] for one in runs) for name in runs[0]}
                rows.append({"session": session, "tree": module.__name__, **shares})
        print("share of the prompt computed after an edit, mean\n" + table(rows, list(rows[0])))
        save("engine_trees_orders", [{"edits": EDITS, "seeds": SEEDS, **row} for row in rows], seed=0)
    if part != "orders":
        with Engine.random(SHAPE, tokenizer=tokenizer, dtype="float32", pool_bytes=1 << 28) as engine:
            rows = [
                row
                for module in TREES
                for kind in ("cache off", "by path", "radixkv")
                for row in questions(module, engine, kind)
            ]
        cold = {(row["tree"], row["step"]): row["answer"] for row in rows if row["engine"] == "cache off"}
        mine = [row["answer"] == cold[row["tree"], row["step"]] for row in rows if row["engine"] == "radixkv"]
        for row in rows:
            row.pop("answer")
        print(table(rows, list(rows[0])))
        print(f"first tokens equal to those with the cache off: {sum(mine)} of {len(mine)}")
        save("engine_trees", rows, seed=0)


if __name__ == "__main__":
    main()
