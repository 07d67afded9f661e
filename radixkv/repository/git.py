"""Asking git, where it is installed, about a folder that may be anybody's."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

__all__ = ["run_git"]

log = logging.getLogger("radixkv.repository")

# A repository's own settings may name programs to run; what they could matter to is switched off.
_SAFE = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "log.showSignature=false")
# Set where git itself started us (a hook), and about another repository.
_FOREIGN = {
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_PREFIX",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
    "GIT_NAMESPACE",
}
_QUIET = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"}


def run_git(folder: Path, *arguments: str, timeout_s: float = 60.0) -> bytes | None:
    """Run a git command that only reads, in a folder.

    Returns:
        What it printed; None where git is not installed, refuses the folder (no repository, somebody else's), or takes
        longer than `timeout_s`. The log says which.
    """
    env = {name: value for name, value in os.environ.items() if name not in _FOREIGN} | _QUIET
    try:
        done = subprocess.run(
            ["git", *_SAFE, "-C", str(folder), *arguments],
            capture_output=True,
            check=False,
            timeout=timeout_s,
            env=env,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("git %s in %s gives nothing: %s", arguments[0], folder, error)
        return None
    if done.returncode:
        log.info("git %s in %s gives nothing: %s", arguments[0], folder, done.stderr.decode("utf-8", "replace").strip())
        return None
    return done.stdout
