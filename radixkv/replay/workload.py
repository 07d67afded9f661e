"""A workload: what traces ask of a cache of one page size, kept on disk so that it can be replayed many times.

    a request's blocks of 512 tokens         [ 4    5    9 ]
    page size 512                            [ 4    5    9 ]                 page ids, dense
    page size 128, stride 4: first pages     [16   20   36 ]   replayed as   [16 17 18 19 20 21 22 23 36 37 38 39]
    page size 1024: pairs of blocks          [ 2 ]                           the last block has no pair

What is kept is the first page of every `stride` pages that always come together; they are written out when a request is
replayed. A page id stands for a page and all before it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from os import PathLike
from tempfile import SpooledTemporaryFile
from types import TracebackType

import numpy as np
import numpy.typing as npt

from radixkv.errors import ConfigError
from radixkv.replay.blocks import IdCounter
from radixkv.replay.formats import OnBytes, TraceRequest, read_traces

__all__ = ["Pages", "Workload", "token_pairs"]

Pages = npt.NDArray[np.int32]
"""[P] int32 page ids of one request, from its beginning."""

_IN_MEMORY = 2**26  # bytes of page ids; more than that goes to a temporary file
_CHUNK = 2**20  # bytes read back at once


def token_pairs(num_tokens: int) -> int:
    """(query, key) pairs of a causal prefill of `num_tokens` tokens: what attention costs is proportional to it."""
    return num_tokens * (num_tokens + 1) // 2


class Workload:
    """Requests as page ids, and their totals; a context manager that drops the temporary file.

    Made by `load` or `of`. Memory: 16 B a request, 4 B a distinct block, and at most 64 MiB of page ids; the other page
    ids, 4 B x (blocks or pages, the fewer), are in a temporary file.

    Attributes:
        page_size: tokens in a page.
        num_requests: requests.
        num_input_tokens: tokens of all prompts.
        num_output_tokens: tokens of all answers.
        num_input_pages: whole pages of all prompts; partial last chunks are left out.
        num_pages: distinct pages: the footprint, what a cache that never evicts would hold.
        input_pairs: `token_pairs` of all prompts.
        duration_s: from the first arrival to the last.
        lengths: [requests] pages of each prompt.
        times: [requests] arrivals, in seconds on the trace's own clock.
    """

    def __init__(self, page_size: int) -> None:
        if page_size < 1:
            raise ConfigError("page_size", page_size, "at least 1")
        self.page_size = page_size
        self.num_requests = self.num_input_tokens = self.num_output_tokens = self.num_input_pages = 0
        self.input_pairs = 0
        self.duration_s = 0.0
        self.lengths = array("i")
        self.times = array("d")
        self._strides = array("i")
        self._ids = IdCounter()
        self._first = np.full(1024, -1, np.int32)  # block id -> first page id
        self._file: SpooledTemporaryFile[bytes] = SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115

    @classmethod
    def load(
        cls,
        paths: Sequence[str | PathLike[str]],
        *,
        page_size: int | None = None,
        share: bool = False,
        block_tokens: int | None = None,
        limit: int | None = None,
        on_bytes: OnBytes | None = None,
    ) -> Workload:
        """Read trace files, merged by time.

        Cost: one pass over the files, some 10 us and 0.1 us a block for each request.

        Args:
            paths: the files.
            page_size: tokens in a page; the traces' block size by default.
            share: equal block ids of different files are equal prefixes.
            block_tokens: tokens in a block where a format does not say.
            limit: read so many requests at most.
            on_bytes: called now and then with how many more bytes of the files were read.

        Raises:
            TraceError: a line cannot be read.
            ConfigError: page and block sizes of which neither divides the other; traces of different block sizes
                without a page size, or sharing ids.
        """
        requests = read_traces(paths, share=share, block_tokens=block_tokens, on_bytes=on_bytes)
        return cls.of(islice(requests, limit), page_size=page_size, one_block_size=share or page_size is None)

    @classmethod
    def of(cls, requests: Iterable[TraceRequest], *, page_size: int | None = None, one_block_size: bool = False) -> Workload:
        """Take requests as they come; as `load`, for requests made elsewhere.

        Args:
            requests: in order of arrival.
            page_size: tokens in a page; the first request's block size by default.
            one_block_size: refuse a request with other blocks than the first one's.
        """
        workload: Workload | None = None
        try:
            for request in requests:
                if workload is None:
                    expected = request.block_tokens
                    workload = cls(page_size or expected)
                if one_block_size and request.block_tokens != expected:
                    raise ConfigError(
                        "page_size",
                        page_size,
                        f"--page-size, and no --share: the traces have blocks of {expected} and of "
                        f"{request.block_tokens} tokens",
                    )
                workload.append(request)
        except BaseException:
            if workload is not None:
                workload.close()
            raise
        if workload is None:
            raise ConfigError("requests", 0, "at least one")
        return workload

    def append(self, request: TraceRequest) -> None:
        """Add the next request. Cost: a few numpy calls on its blocks."""
        stride = self._stride(request.block_tokens)
        firsts = self._firsts(request.blocks, request.block_tokens, stride)
        self._file.write(firsts.tobytes())
        num_pages = len(firsts) * stride
        self.lengths.append(num_pages)
        self.times.append(request.time_s)
        self._strides.append(stride)
        self.num_requests += 1
        self.num_input_tokens += request.num_input_tokens
        self.num_output_tokens += request.num_output_tokens
        self.num_input_pages += num_pages
        self.input_pairs += token_pairs(request.num_input_tokens)
        self.duration_s = request.time_s - self.times[0]

    @property
    def num_pages(self) -> int:
        """Distinct pages."""
        return self._ids.used

    def _stride(self, block_tokens: int) -> int:
        if block_tokens % self.page_size and self.page_size % block_tokens:
            raise ConfigError("page_size", self.page_size, f"a divisor or a multiple of {block_tokens}, the block size")
        return max(block_tokens // self.page_size, 1)

    def _firsts(self, blocks: Pages, block_tokens: int, stride: int) -> Pages:
        """The first page of each block, or of each whole group of blocks that fills a page."""
        group = max(self.page_size // block_tokens, 1)
        last = blocks[group - 1 :: group]  # a block's id stands for its prefix, so the group's last one names the page
        if not len(last):
            return last
        needed = int(last.max()) + 1
        if needed > len(self._first):
            larger = np.full(max(needed, 2 * len(self._first)), -1, np.int32)
            larger[: len(self._first)] = self._first
            self._first = larger
        firsts = self._first[last]
        new = firsts < 0
        num_new = int(np.count_nonzero(new))
        if num_new:
            start = self._ids.take(num_new * stride)
            firsts[new] = np.arange(start, start + num_new * stride, stride, dtype=np.int32)
            self._first[last[new]] = firsts[new]
        return firsts

    # -- replay -------------------------------------------------------------------------------------------------------

    def runs(self) -> Iterator[tuple[Pages, int]]:
        """Each request as (first pages, stride): what `paths` writes out. Cost: one read of the temporary file."""
        data, at, position = b"", 0, 0
        for num_pages, stride in zip(self.lengths, self._strides, strict=True):
            size = 4 * (num_pages // stride)
            if at + size > len(data):
                self._file.seek(position)
                data, at = self._file.read(max(_CHUNK, size)), 0
            yield np.frombuffer(data, np.int32, size // 4, at), stride
            at += size
            position += size

    def paths(self, max_pages: int) -> Iterator[bytes]:
        """Each request's page ids as int32 bytes, the first `max_pages` of them. Cost: as `runs`, and 4 B a page."""
        for firsts, stride in self.runs():
            if stride == 1:
                yield firsts[:max_pages].tobytes()
            else:
                kept = firsts[: -(-max_pages // stride)]
                pages = kept[:, None] + np.arange(stride, dtype=np.int32)
                yield pages.ravel()[:max_pages].tobytes()

    def close(self) -> None:
        """Drop the temporary file."""
        self._file.close()

    def __enter__(self) -> Workload:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
