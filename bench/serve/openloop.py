"""Send requests when they are due, whatever became of those before, and time what comes back token by token."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.serve.arrivals import Arrival
from radixkv_client import EventDecoder


@dataclass
class Outcome:
    """What became of one request; times in seconds from the start of the run.

    Attributes:
        due_s: when it was to be sent: waiting counts from here.
        first_s, end_s: when its first token came, and its last.
        gaps_s: between tokens.
        num_tokens: of the answer.
        prompt_tokens, cached_tokens: as its usage says.
        text: the answer.
        error: why there is none, if so.
    """

    due_s: float
    first_s: float = 0.0
    end_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """From when it was due to its first token."""
        return self.first_s - self.due_s

    @property
    def mean_gap_s(self) -> float:
        """Mean time between its tokens; 0 for an answer of one token."""
        return sum(self.gaps_s) / len(self.gaps_s) if self.gaps_s else 0.0


async def replay(url: str, arrivals: Sequence[Arrival], patience_s: float) -> list[Outcome]:
    """Send every arrival at its time; the outcomes, in their order.

    Args:
        url: of the server.
        arrivals: what to send.
        patience_s: a request that has not ended so long after it was due has failed.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)  # nobody waits for a connection
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as http:
        start = time.perf_counter()
        return list(await asyncio.gather(*(_send(http, one, start, patience_s) for one in arrivals)))


async def _send(http: httpx.AsyncClient, arrival: Arrival, start: float, patience_s: float) -> Outcome:
    outcome = Outcome(arrival.at_s)
    body = {
        "prompt": arrival.prompt,
        "max_tokens": arrival.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    await asyncio.sleep(max(arrival.at_s - (time.perf_counter() - start), 0.0))
    try:
        async with asyncio.timeout(patience_s), http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                outcome.error = f"{response.status_code} {response.text[:200]}"
                return outcome
            await _read(response, outcome, start)
    except TimeoutError:
        outcome.error = f"not ended {patience_s:g} s after it was due"
    except (httpx.HTTPError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def _read(response: httpx.Response, outcome: Outcome, start: float) -> None:
    """Follow a stream. An event may carry several tokens' text: its usage says how many, and its gap is shared by them.

    NOTE: a token that completes no character sends no event, so the first token is timed from the first text.
    """
    decoder, done = EventDecoder(), False
    async for data in response.aiter_bytes():
        now = time.perf_counter() - start
        for event in decoder.feed(data):
            if event.kind == "error":
                raise ValueError(event.data)
            done = done or event.data == "[DONE]"
            if event.data != "[DONE]":
                _take(json.loads(event.data), outcome, now)
    if not done:
        raise ValueError("the stream ended before its end")


def _take(value: dict[str, Any], outcome: Outcome, now: float) -> None:
    usage = value["usage"]
    new = usage["completion_tokens"] - outcome.num_tokens
    if new > 0:
        first = outcome.num_tokens == 0
        if not first:
            outcome.gaps_s += [(now - outcome.end_s) / new] * new
        outcome.first_s = now if first else outcome.first_s
        outcome.end_s, outcome.num_tokens = now, usage["completion_tokens"]
    outcome.prompt_tokens = usage["prompt_tokens"]
    outcome.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    outcome.text += "".join(choice["text"] for choice in value["choices"])
