"""Download one file whose content is known: resumed after a cut, verified, and there by one rename or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import filelock
import httpx

from radixkv.errors import ChecksumMismatch, FetchError

__all__ = ["Progress", "append_chunks", "download", "file_sha256", "file_size", "locked"]

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20


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
        actual = file_sha256(part)
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


def _transfer(
    url: str, part: Path, num_bytes: int, progress: Progress | None, attempts: int, sleep: Callable[[float], None]
) -> None:
    """Fill `part` until it holds `num_bytes`, or until the server says that it has no more."""
    if urlsplit(url).scheme == "file":
        with Path(url2pathname(urlsplit(url).path)).open("rb") as source:
            append_chunks(part, iter(lambda: source.read(_CHUNK_BYTES), b""), 0, num_bytes, progress)
        return
    failures = 0
    timeout = httpx.Timeout(30.0, connect=15.0)
    with httpx.Client(follow_redirects=True, timeout=timeout) as client:  # trust_env: proxies, SSL_CERT_FILE, netrc
        while True:
            before = file_size(part)
            try:
                _receive(client, url, part, num_bytes, progress)
                return
            except (httpx.TransportError, _CutError) as error:
                said = str(error) or type(error).__name__
                failures = 1 if file_size(part) > before else failures + 1
                if failures >= attempts:
                    advice = "check the network or the proxy, then run it again: it resumes"
                    raise FetchError(url, f"{said} ({attempts} attempts); {advice}") from error
                pause_s = min(0.5 * 2**failures, 15.0)
                _log.info("%s after %d bytes; again in %.1f s", said, file_size(part), pause_s)
                sleep(pause_s)


def _receive(client: httpx.Client, url: str, part: Path, num_bytes: int, progress: Progress | None) -> None:
    start = file_size(part)
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
            raise FetchError(url, f"the server answered HTTP {status}; check the package index that pip is configured for")
        if status == 200 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            if status == 206:
                part.unlink(missing_ok=True)
                raise _CutError("the server sent another range than asked for")
            start = 0
        append_chunks(part, response.iter_raw(), start, num_bytes, progress)
        # NOTE: a body that ends with its connection cannot be told from a cut one; a framed body that is
        # complete and too short is another file, which the checksum will say.
        framed = "Content-Length" in response.headers or "chunked" in response.headers.get("Transfer-Encoding", "")
        if file_size(part) < num_bytes and not framed:
            raise _CutError("the connection ended early")


def append_chunks(part: Path, chunks: Iterable[bytes], start: int, num_bytes: int, progress: Progress | None) -> None:
    """Write chunks into `part` from byte `start`, and see to it that they are on the disk."""
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


def file_sha256(path: Path) -> str:
    """Digest a file's content; about 1.5 GB/s."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0
