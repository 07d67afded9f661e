"""Which request used each page last, in runs: all that the exact LRU curve and the offline optimum need.

    request 7's path, by the request that used a page last     [ 6 6 6 | 4 4 | 1 | - - ]      - : never used

A request uses every page from the root to its end, so along a path the last users only get older, and pages with one
last user stand together: a path is a few runs, however many pages it has. A run (source 4, target 7, pages 3 to 5) says
both that request 7 found pages last used by 4, and that of request 4's pages those are used next by 7.

The runs of one source do not overlap, and together they are a beginning of its path: a later request shares such a
beginning with it and takes what others have not taken before. So a few runs a request stand for all page accesses, at
any page size.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from radixkv.errors import ConfigError
from radixkv.replay.workload import Workload

__all__ = ["Reuse"]

Column = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Reuse:
    """Every run of a workload, by target, then by depth.

    Attributes:
        source: [runs] the request that used the pages last.
        target: [runs] the request that found them.
        start: [runs] pages before the run on the path.
        stop: [runs] pages up to its end.
    """

    source: Column
    target: Column
    start: Column
    stop: Column

    @classmethod
    def of(cls, workload: Workload, on_requests: Callable[[int], None] | None = None) -> Reuse:
        """One pass over `workload`.

        Cost: a few numpy calls a request. Memory: 4 B a distinct page (or block), 32 B a run.
        """
        last_user = np.full(workload.num_pages, -1, np.int32)  # by first page id
        columns = array("q"), array("q"), array("q"), array("q")
        for target, (firsts, stride) in enumerate(workload.runs()):
            users = last_user[firsts]
            last_user[firsts] = target
            if len(users) and users[0] >= 0:
                bounds = (np.flatnonzero(users[1:] != users[:-1]) + 1).tolist()
                for start, stop in zip([0, *bounds], [*bounds, len(users)], strict=True):
                    source = users.item(start)
                    if source < 0:
                        break
                    for column, value in zip(columns, (source, target, start * stride, stop * stride), strict=True):
                        column.append(value)
            if on_requests is not None:
                on_requests(1)
        return cls(*(np.array(column, np.int64) for column in columns))

    def continued(self, lengths: array[int]) -> npt.NDArray[np.bool_]:
        """[requests] whether a later request goes on from the last page of each: the oracle of "will continue".

        Args:
            lengths: the workload's.
        """
        whole = self.stop == np.array(lengths, np.int64)[self.source] if len(self.source) else np.empty(0, bool)
        result = np.zeros(len(lengths), np.bool_)
        result[self.source[whole]] = True
        return result

    def hints(self, lengths: array[int], accuracy: float, seed: int) -> list[int]:
        """[requests] one-bit tags that say whether a request is continued, each right with probability `accuracy`.

        What a session API knows of its sessions, with its mistakes.

        Raises:
            ConfigError: an accuracy that is no probability.
        """
        if not 0 <= accuracy <= 1:
            raise ConfigError("tag_accuracy", accuracy, "0 to 1")
        wrong = np.random.default_rng(seed).random(len(lengths)) >= accuracy
        return [int(tag) for tag in self.continued(lengths) ^ wrong]
