"""What is written is true: names are documented, links lead somewhere, the README runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("radixkv", "radixkv_kernels", "radixkv_service", "radixkv_client")


def modules():
    for package in PACKAGES:
        root = importlib.import_module(package)
        yield root
        for info in pkgutil.walk_packages(root.__path__, f"{package}."):
            if not info.name.endswith("__main__"):
                yield importlib.import_module(info.name)


MODULES = {module.__name__: module for module in modules()}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_lists_its_public_names_and_documents_them(name):
    module = MODULES[name]
    assert module.__doc__
    if not hasattr(module, "__all__"):
        assert name in ("radixkv.store", "radixkv.replay")
        return
    assert len(set(module.__all__)) == len(module.__all__)  # ruff keeps them sorted
    for public in module.__all__:
        value = getattr(module, public)
        if isinstance(value, type) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{public} has no docstring"
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    missing = {public for public in defined if not public.startswith("_")} - set(module.__all__)
    assert not missing, f"{name}: public but not in __all__: {missing}"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("radixkv.engine")])
def test_doctests(name):
    result = doctest.testmod(MODULES[name])
    assert result.failed == 0


@pytest.mark.parametrize("setting", ["EngineConfig", "SamplingParams"])
def test_every_setting_is_described(setting):
    kind = getattr(importlib.import_module("radixkv.engine"), setting)
    for field in kind.__dataclass_fields__:
        assert re.search(rf"^\s+{field}: \S", kind.__doc__, re.MULTILINE), f"{setting}.{field}"


def test_every_command_and_option_has_help():
    import typer

    from radixkv.cli import app

    def visit(command, path):
        assert command.help, path
        for param in command.params:
            assert getattr(param, "help", None) or param.name == "help", f"{path} {param.name}"
        for name, child in getattr(command, "commands", {}).items():
            visit(child, f"{path} {name}")

    visit(typer.main.get_command(app), "radixkv")


def test_every_dependency_is_justified():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [one for extra in project["optional-dependencies"].values() for one in extra]
    names = {re.split(r"[><=\[]", one)[0] for one in wanted} - {"radixkv"}
    text = (ROOT / "docs/dependencies.md").read_text()
    assert [name for name in sorted(names) if name not in text] == []


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page} -> {target}"


def test_paths_named_in_docstrings_exist():
    for module in MODULES.values():
        for target in re.findall(r"docs/[\w/.-]+\.md", Path(module.__file__).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{module.__name__} names {target}"


def test_the_readme_is_short_and_its_python_runs(smollm2):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_python_of_the_eviction_guide_runs():
    text = (ROOT / "docs/eviction.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/eviction.md", "exec"), names)
    assert "cost" in names


def test_the_readmes_tables_are_those_the_benchmarks_wrote():
    from bench.report import PAGES, render

    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert render(text) == text, f"run `python -m bench.report` after a benchmark: {page.name}"


def test_each_package_is_typed():
    for package in PACKAGES:
        folder = Path(importlib.import_module(package).__file__).parent
        assert (folder / "py.typed").exists()
