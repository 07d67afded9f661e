"""On a hit, where does the time to the first token go? `python -m bench.serve.overhead`.

The server's own application runs in this process, on a real socket, in a thread of its own; a client sends one request
after another over one plain connection, and its first token is timed from the first byte sent to the first event's arrival.
Each request asks something new about a long document that is cached. Named functions of server and engine are wrapped in
two reads of a clock (bench/serve/spans.py): no profiler runs. What no function covers is named by what is around it.

Two cases, in turn: `loaded`, a document whose working view is gone, because more are asked about in turn than views are
kept, so that the hit copies its pages into a view; and `kept`, the same document right after, whose view is still there.
Parts are means over the middle half of a case's requests, by their total, and add up to it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from json import decoder
from typing import Any

import uvicorn
from pydantic import BaseModel

import radixkv.engine.batcher
import radixkv_service.chat
from bench.common import save, table
from bench.serve.spans import Point, Span, attribute, timed
from radixkv.engine.batcher import Batcher
from radixkv.engine.engine import Engine
from radixkv.engine.executor import Executor
from radixkv.engine.request import Request
from radixkv.engine.runner import ModelRunner
from radixkv.engine.sampler import Sampler
from radixkv.engine.tokenizer import TextStream, Tokenizer
from radixkv_client import Client, Retry
from radixkv_service.app import create_app
from radixkv_service.protocol import ConnectionLimits, GuardedConfig, GuardedProtocol
from radixkv_service.server import bind
from radixkv_service.service import Service
from radixkv_service.settings import load_settings

PARSE, DIALOG, TEMPLATE, TOKENISE = "parse HTTP", "prompt: messages, digests", "prompt: template", "prompt: tokenise"
REQUEST, PLAN, LOOKUP, LOAD, RESERVE = (
    "make the request",
    "plan the step",
    "look-up and lock",
    "load the view",
    "reserve pages",
)
FORWARD, SAMPLE, DETOKENISE, PUBLISH = "model forward", "sample", "detokenise", "save and publish pages"
STEP, ACCEPT, ENCODE = "step: the rest", "accept the token: the rest", "encode events"
IN, TO_ENGINE, TO_CLIENT = (
    "in: socket, gate, JSON, validation",
    "wait: threads, to the engine",
    "out: threads, event loop, socket",
)

ORDER = (
    *(PARSE, IN, DIALOG, TEMPLATE, TOKENISE, REQUEST, TO_ENGINE, PLAN, LOOKUP, LOAD, RESERVE, FORWARD, SAMPLE, DETOKENISE),
    *(ACCEPT, PUBLISH, STEP, ENCODE, TO_CLIENT),
)
_BEFORE_STEP = (DIALOG, TEMPLATE, TOKENISE, REQUEST)
_CHARS = 11_000  # of a document: about 3,000 tokens


def points() -> list[Point]:
    """What is timed."""
    return [
        Point(PARSE, GuardedProtocol, "data_received"),
        Point(DIALOG, radixkv_service.chat, "open_dialog"),
        Point(TEMPLATE, Tokenizer, "chat_text"),
        Point(TOKENISE, Tokenizer, "encode"),
        Point(REQUEST, Engine, "_request"),
        Point(STEP, Batcher, "step"),
        Point(PLAN, Executor, "probe"),
        Point(PLAN, radixkv.engine.batcher, "plan"),
        Point(LOOKUP, Executor, "_lease"),
        Point(LOAD, Executor, "_load"),
        Point(RESERVE, Executor, "reserve"),
        Point(FORWARD, ModelRunner, "forward"),
        Point(ACCEPT, Request, "accept"),
        Point(SAMPLE, Sampler, "choose"),
        Point(DETOKENISE, TextStream, "push"),
        Point(PUBLISH, Executor, "advance"),
        Point(ENCODE, BaseModel, "model_dump_json"),
    ]


def gap(before: str, after: str) -> str:
    """What happens where nothing timed runs."""
    if before in ("", PARSE) and after in ("", PARSE, DIALOG):
        return IN
    return TO_ENGINE if before in _BEFORE_STEP else TO_CLIENT


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=40, help="requests a case")
    parser.add_argument("--documents", type=int, default=4, help="more than views are kept")
    options = parser.parse_args()
    with timed(points()):  # all of them are there, before anything takes its time
        pass
    with serving(options.model, options.dtype) as (host, port), socket.create_connection((host, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for document in range(options.documents):
            ask(connection, document, "Hello?")
        cases = measure(connection, options.repeats, options.documents)
    rows = [_row(stage, cases) for stage in ORDER]
    rows += [{"stage": "all", **{f"{case}_ms": one["ttft_ms"] for case, one in cases.items()}}]
    print(table(rows, ["stage", *(f"{case}_{unit}" for case in cases for unit in ("ms", "share"))]))
    for case, one in cases.items():
        print(
            f"{case}: {one['prompt_tokens']:.0f} prompt tokens, {one['cached_tokens']:.0f} of them cached; "
            f"{one['compute_share']:.1%} of the time is the model's forward pass"
        )
    save(
        "serve_overhead",
        [{"case": case, "model": options.model, "dtype": options.dtype, **one} for case, one in cases.items()],
        0,
    )


@contextmanager
def serving(model: str, dtype: str) -> Iterator[tuple[str, int]]:
    """The service's application on a socket of this process, ready; the address."""
    settings = load_settings({"model": model, "dtype": dtype, "port": 0})
    service, listener = Service(settings), bind(settings)
    host, port = listener.getsockname()[:2]
    limits = ConnectionLimits(settings.header_timeout, settings.write_timeout)
    config = GuardedConfig(create_app(service), limits, log_config=None, access_log=False, timeout_keep_alive=600)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        with Client(f"http://{host}:{port}", retry=Retry(120, max_wait_s=5.0)) as client:
            client.models()
        yield host, port
    finally:
        server.should_exit = True
        thread.join()


def measure(connection: socket.socket, repeats: int, num_documents: int) -> dict[str, dict[str, Any]]:
    """Documents in turn, each asked about twice: the first time its view is to be loaded, the second time it is there."""
    results: dict[str, list[tuple[dict[str, float], dict[str, Any]]]] = {"loaded": [], "kept": []}
    with timed(points()) as spans:
        for index in range(repeats + num_documents):
            for case, asked in results.items():
                spans.clear()
                question = f"What is meant by number {index * 37}, {case}?"
                sent_s, first_s, usage = ask(connection, index % num_documents, question)
                if index >= num_documents:  # the first round settles which views are there
                    asked.append((_parts(list(spans), sent_s, first_s), usage))
    return {case: _summary(asked) for case, asked in results.items()}


def _summary(asked: list[tuple[dict[str, float], dict[str, Any]]]) -> dict[str, Any]:
    """Means of the middle half."""
    asked.sort(key=lambda one: sum(one[0].values()))
    middle = asked[len(asked) // 4 : len(asked) - len(asked) // 4]
    stages = {stage: statistics.fmean(parts.get(stage, 0.0) for parts, _ in middle) * 1e3 for stage in ORDER}
    total = statistics.fmean(sum(parts.values()) for parts, _ in middle) * 1e3
    return {
        "ttft_ms": total,
        "compute_share": stages[FORWARD] / total,
        "prompt_tokens": statistics.fmean(usage["prompt_tokens"] for _, usage in middle),
        "cached_tokens": statistics.fmean(usage["prompt_tokens_details"]["cached_tokens"] for _, usage in middle),
        "stages_ms": stages,
    }


def _parts(spans: list[Span], sent_s: float, first_s: float) -> dict[str, float]:
    """The stages of one request. What the engine does once the first token's step has ended is no part of its way out."""
    chosen_s = next(one.end_s for one in spans if one.stage == ACCEPT)
    ended_s = next(one.end_s for one in spans if one.stage == STEP and one.end_s >= chosen_s)
    parts = attribute([one for one in spans if one.start_s < ended_s or one.stage == ENCODE], sent_s, first_s, gap)
    unknown = parts.keys() - set(ORDER)
    assert not unknown, unknown
    return parts


def ask(connection: socket.socket, document: int, question: str) -> tuple[float, float, dict[str, Any]]:
    """One streamed request: when its first byte was sent, when its first event was there, its usage."""
    text = f"Document {document}.\n" + inspect.getsource(decoder)[:_CHARS]
    body = json.dumps(
        {
            "messages": [{"role": "system", "content": text}, {"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    message = head + b"content-length: %d\r\n\r\n" % len(body) + body
    sent_s, first_s, answer = time.perf_counter(), 0.0, b""
    connection.sendall(message)
    while not answer.endswith(b"0\r\n\r\n"):
        answer += connection.recv(65536)
        if not first_s and b"data: " in answer:
            first_s = time.perf_counter()
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer.decode("utf-8", "replace"))
    last = [line for line in answer.splitlines() if line.startswith(b"data: {") and b'"usage"' in line][-1]
    return sent_s, first_s, json.loads(last[6:])["usage"]


def _row(stage: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": stage}
    for case, one in cases.items():
        row[f"{case}_ms"] = one["stages_ms"][stage]
        row[f"{case}_share"] = f"{one['stages_ms'][stage] / one['ttft_ms']:.1%}"
    return row


if __name__ == "__main__":
    main()
