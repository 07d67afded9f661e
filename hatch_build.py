"""Compiles the core where there is a C compiler: the same Python source, through mypyc.

    pip install .            the wheel carries compiled modules; where compiling fails it carries the source alone, and
                             says so: nothing but speed differs
    pip install -e .         an editable install always runs the source
    python hatch_build.py    compile in place, to measure or test (`make native`); `python hatch_build.py --clean` undoes it

RADIXKV_NATIVE=0 in the environment builds a wheel without compiling; =1 makes a failure to compile an error.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script, where the build tool is not needed
    BuildHookInterface = object

ROOT = Path(__file__).parent
MODULES = (
    "tokens",
    "prefix",
    "siblings",
    "node",
    "match",
    "tree",
    "pages",
    "policies/policy",
    "policies/queues",
    "policies/classic",
    "policies/levels",
    "quota",
    "cover",
    "allocator",
    "events",
    "lease",
    "pins",
    "leasing",
    "stats",
    "check",
    "drawing",
    "cache",
)
"""What is compiled: the core's path from prompt to lease, and nothing around it; and `_pack.c`."""


_MYPY = """[mypy]
ignore_missing_imports = True
follow_imports = silent
[mypy-numpy.*,sortedcontainers.*]
follow_imports = skip
"""  # the same types whatever happens to be installed where it is built


class NativeBuildHook(BuildHookInterface):  # type: ignore[misc, valid-type]
    """Puts compiled modules beside the source of every wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by the build tool before it packs a wheel."""
        wanted = os.environ.get("RADIXKV_NATIVE", "auto")
        if version == "editable" or wanted == "0":
            return
        self._folder = tempfile.mkdtemp(prefix="radixkv-native-")
        try:
            built = compile_core(Path(self.root), Path(self._folder))
        except (Exception, SystemExit) as error:
            if wanted == "1":
                raise
            why = " ".join(str(error).split())[:200]
            self.app.display_warning(f"radixkv: not compiled ({why}); the pure-Python core does the same, slower")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        for path in built:
            build_data["force_include"][str(path)] = str(path.relative_to(self._folder))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the wheel is packed."""
        if hasattr(self, "_folder"):
            shutil.rmtree(self._folder, ignore_errors=True)


def compile_core(root: Path, folder: Path) -> list[Path]:
    """Compile a copy of the core in `folder`; returns the extension modules. Takes half a minute."""
    from mypyc.build import mypycify
    from setuptools import Distribution, Extension

    shutil.copytree(root / "radixkv", folder / "radixkv", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    settings = folder / "mypy.ini"
    settings.write_text(_MYPY)
    with chdir(folder):
        sources = [f"radixkv/{name}.py" for name in MODULES]
        extensions = mypycify([f"--config-file={settings}", *sources], opt_level="3", debug_level="0")
        extensions.append(Extension("radixkv._pack", ["radixkv/_pack.c"]))
        command = Distribution({"name": "radixkv", "ext_modules": extensions}).get_command_obj("build_ext")
        command.inplace = True
        command.ensure_finalized()
        command.run()
    return [*folder.glob("*.so"), *folder.glob("radixkv/**/*.so"), *folder.glob("*.pyd"), *folder.glob("radixkv/**/*.pyd")]


def main() -> None:
    """Compile in place, or take the compiled modules away."""
    for path in [*ROOT.glob("*__mypyc*.so"), *(ROOT / "radixkv").rglob("*.so")]:
        path.unlink()
    if sys.argv[1:] == ["--clean"]:
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in compile_core(ROOT, Path(folder)):
            shutil.copy2(path, ROOT / path.relative_to(folder))


if __name__ == "__main__":
    main()
