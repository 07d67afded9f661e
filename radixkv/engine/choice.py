"""The next tokens of a step's requests: chosen on the device, read when somebody needs to know them.

    logits [m, V] ── argmax of all plain rows, the others one by one ──▶ tokens [m] on the device ──▶ the next step
                                                                            └── copied meanwhile ──▶ read()

A request whose sampler fails has no token; the others have theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from radixkv.engine.sampler import Pick, Sampler, TokenLogprob

__all__ = ["Choice"]


class Choice:
    """What a step chose.

    Args:
        samplers: one for each row.
        logits: [m, V].

    Attributes:
        tokens: [m] int64 on the device, for the next step; 0 where choosing failed.
    """

    __slots__ = ("_copied", "_failed", "_host", "_known", "_picks", "_samplers", "tokens")

    def __init__(self, samplers: Sequence[Sampler], logits: torch.Tensor) -> None:
        self._samplers = samplers
        self._picks: dict[int, Pick] = {}
        self._failed: dict[int, Exception] = {}
        self._known: list[int] = []
        cuda = logits.is_cuda  # what can fail comes first: a sampler that has picked cannot be asked again
        self._host = torch.empty(len(logits), dtype=torch.int64, pin_memory=cuda)
        self._copied = torch.cuda.Event() if cuda else None
        self.tokens = logits.argmax(-1)
        for row, sampler in enumerate(samplers):
            if not sampler.plain:
                self._pick(row, sampler, logits[row])
        self._host.copy_(self.tokens, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(logits.device))

    def _pick(self, row: int, sampler: Sampler, logits: torch.Tensor) -> None:
        try:
            pick = sampler.pick(logits)
        except Exception as error:  # this request's own: `read` says so
            self._failed[row] = error
            self.tokens[row] = 0
        else:
            report = None if pick.report is None else tuple(part.to("cpu", non_blocking=True) for part in pick.report)
            self._picks[row] = Pick(pick.token, report)
            self.tokens[row : row + 1] = pick.token

    def wait(self) -> None:
        """Wait until the device has chosen.

        Raises:
            RuntimeError: what went wrong on the device since the last time somebody waited for it.
        """
        if self._copied is not None:
            self._copied.synchronize()
        self._known = self._host.tolist()

    def read(self, row: int) -> tuple[int, TokenLogprob | None]:
        """One request's token, after `wait`.

        Raises:
            What its sampler raised.
        """
        if row in self._failed:
            raise self._failed[row]
        if row in self._picks:
            return self._samplers[row].read(self._picks[row], self._known[row])
        return self._known[row], None
