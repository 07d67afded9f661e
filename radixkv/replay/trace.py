"""One request of a trace, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["BlockArray", "TraceRequest"]

BlockArray = npt.NDArray[np.int32]
"""[B] int32 ids of a request's full blocks, from its beginning."""


@dataclass(frozen=True, slots=True, eq=False)
class TraceRequest:
    """A request as a trace tells it: when, how long, and which prefix blocks.

    "Block" is the trace formats' own word: so many tokens of the prompt, known by an id.

    Attributes:
        time_s: arrival, seconds on the trace's own clock.
        num_input_tokens: tokens of the prompt.
        num_output_tokens: tokens of the answer.
        blocks: ids of the prompt's full blocks, the partial last chunk left out. An id stands for its block and all
            before it, so equal ids mean equal prefixes, and an id always follows the same one.
        block_tokens: tokens in a block.
        continues: whether it carries an earlier request on; None where the format does not say.
        turn: its number in its conversation, from 1; None where the format does not say.
        kind: what the format calls its type ("text", "image", ...); empty where it does not say.
    """

    time_s: float
    num_input_tokens: int
    num_output_tokens: int
    blocks: BlockArray
    block_tokens: int
    continues: bool | None = None
    turn: int | None = None
    kind: str = ""
