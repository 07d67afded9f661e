"""The core and the client import where torch is not installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ("numpy", "numpy.libs", "xxhash", "sortedcontainers")
CLIENT = ("httpx", "httpcore", "h11", "anyio", "sniffio", "idna", "certifi", "typing_extensions.py")


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory):
    """A fresh virtual environment that sees our packages and the core's and client's dependencies, nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "env", with_pip=False)
    visible = folder / "visible"
    visible.mkdir()
    installed = Path(importlib.util.find_spec("numpy").origin).parent.parent
    for name in CORE + CLIENT:
        if (installed / name).exists():
            (visible / name).symlink_to(installed / name)
    for package in ("radixkv", "client/radixkv_client"):
        (visible / Path(package).name).symlink_to(ROOT / package)
    python = folder / "env" / "bin" / "python"
    site = next((folder / "env" / "lib").glob("python3*")) / "site-packages"
    (site / "visible.pth").write_text(str(visible))

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert run("import numpy").returncode == 0
    assert "No module named 'torch'" in run("import torch").stderr
    return run


@pytest.mark.parametrize("package", ["radixkv", "radixkv_client"])
def test_it_imports_without_torch(clean_python, package):
    done = clean_python(f"import {package}, sys; print({package}.__version__); assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_the_cache_works_without_torch(clean_python):
    done = clean_python(
        "from radixkv import PrefixCache\n"
        "cache = PrefixCache(num_pages=8, page_size=2)\n"
        "with cache.acquire([1, 2, 3, 4, 5]) as lease:\n"
        "    lease.extend(); lease.commit()\n"
        "print(cache.match([1, 2, 3, 9]))\n"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr


def test_the_command_line_says_what_is_missing(clean_python):
    done = clean_python("import radixkv.cli")
    assert done.returncode == 1
    assert "pip install 'radixkv[engine]'" in done.stderr


def test_importing_the_core_in_a_full_environment_does_not_import_torch():
    code = "import radixkv, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
