"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages, whole or streamed.

stream   message_start ─▶ each block: content_block_start, _delta ..., _stop ─▶ message_delta ─▶ message_stop
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from radixkv.engine.options import WILL_CONTINUE
from radixkv.engine.structure import Structure
from radixkv_service.anthropic_answers import (
    ErrorMessage,
    InputTokens,
    Message,
    named_event,
    stop_reason_of,
    usage_so_far,
    whole_usage,
)
from radixkv_service.anthropic_blocks import Blocks
from radixkv_service.anthropic_errors import error_event
from radixkv_service.anthropic_models import CountTokensRequest, MessagesRequest, as_request, refuse_unoffered
from radixkv_service.anthropic_prompt import MessagesPrompt, open_prompt
from radixkv_service.documents import ERRORS
from radixkv_service.errors import Problem, bad_request
from radixkv_service.generation import check_model, ignored_header, options_of, sampling_of, service_of
from radixkv_service.parsing import AnswerParser
from radixkv_service.record import record_of
from radixkv_service.run import Job, Run
from radixkv_service.service import Service
from radixkv_service.streaming import EventStream

if TYPE_CHECKING:
    from radixkv.engine.output import Completion

__all__ = ["count_tokens", "create_message", "router"]

router = APIRouter(tags=["Anthropic"])

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorMessage, "description": one["description"]} for status, one in ERRORS.items()
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, server-sent events that end with `message_stop`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post("/v1/messages", response_model=Message, responses={**_ERRORS, **_STREAM})
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation, whole or streamed."""
    service = service_of(request)
    model = check_model(service, body.model)
    refuse_unoffered(body)
    prompt = await asyncio.to_thread(open_prompt, service, request, body)
    job = _job(service, request, body, prompt)
    run = Run(service, request)
    first = await run.start([job])
    reply = _Reply(body, model, prompt)
    headers = {"x-radixkv-cached-tokens": str(first.cached_tokens), **ignored_header(as_request(body))}
    if body.stream:
        encode = error_event(record_of(request).id)

        def failed(problem: Problem) -> bytes:
            prompt.dialog.undo()
            return encode(problem)

        return EventStream(run, reply.events(run), headers, failed)
    try:
        answer = await reply.whole(run)
    finally:
        run.close()
    return Response(answer.model_dump_json(), 200, headers, "application/json")


@router.post("/v1/messages/count_tokens", response_model=InputTokens, responses=_ERRORS)
async def count_tokens(body: CountTokensRequest, request: Request) -> InputTokens:
    """How many tokens a request's prompt has; nothing is computed."""
    service = service_of(request)
    check_model(service, body.model)
    refuse_unoffered(body)
    prompt = await asyncio.to_thread(open_prompt, service, request, body)
    prompt.dialog.undo()
    return InputTokens(input_tokens=len(prompt.dialog.prompt))


def _job(service: Service, request: Request, body: MessagesRequest, prompt: MessagesPrompt) -> Job:
    plain, dialog = as_request(body), prompt.dialog
    again = dialog.turn is not None or any(message.role == "assistant" for message in body.messages)
    options = options_of(service, request, plain, len(dialog.prompt), WILL_CONTINUE if again else 0)
    structure = _structure(body, prompt)
    params = sampling_of(service, plain, len(dialog.prompt), max_tokens=body.max_tokens, logprobs=None, structure=structure)
    keep = prompt.retention
    return Job(dialog.prompt, params, replace(options, retention=keep, retain_at_end=dialog.keep(keep)))


def _structure(body: MessagesRequest, prompt: MessagesPrompt) -> Structure | None:
    """The form that a tool choice or a schema holds the answer to."""
    form, forced = body.output_config.format if body.output_config else None, prompt.dialog.forced
    if form is None:
        return forced
    if forced is not None:
        raise bad_request("output_config.format: an answer that must call a tool has no other form", "output_config.format")
    return Structure.json_schema(form.schema_)


class _Reply:
    """One request's answer, in either form."""

    def __init__(self, body: MessagesRequest, model: str, prompt: MessagesPrompt) -> None:
        self._parser = AnswerParser(prompt.dialog)
        self._blocks = Blocks(thinking=body.thinking is None or body.thinking.type != "disabled")
        self._prompt = prompt
        self._max_tokens = body.max_tokens
        self._head: dict[str, Any] = {"id": f"msg_{secrets.token_hex(12)}", "model": model}

    async def whole(self, run: Run) -> Message:
        """The answer at once."""
        (completion,) = await run.finish()
        for _ in self._blocks.add(self._parser.push(completion.text, completion)):
            pass
        await self._remember(completion)
        usage, end = whole_usage(completion), self._end(completion)
        return Message(**self._head, content=self._blocks.blocks, usage=usage, **end)

    async def events(self, run: Run) -> AsyncIterator[bytes]:
        """The answer as it is made."""
        begun = False
        async for _, chunk in run.chunks():
            if not begun:
                begun = True
                yield self._start(chunk.cached_tokens)
            for data in self._blocks.add(self._parser.push(chunk.text, chunk.completion)):
                yield data
            if chunk.completion is not None:
                for data in self._blocks.close():
                    yield data
                await self._remember(chunk.completion)
                usage = whole_usage(chunk.completion).model_dump()
                yield named_event("message_delta", delta=self._end(chunk.completion), usage=usage)
        yield named_event("message_stop")

    def _start(self, num_cached: int) -> bytes:
        usage = usage_so_far(len(self._prompt.dialog.prompt), num_cached)
        message = Message(**self._head, content=[], stop_reason=None, stop_sequence=None, usage=usage)
        return named_event("message_start", message=message.model_dump())

    def _end(self, completion: Completion) -> dict[str, Any]:
        reason = stop_reason_of(completion, called=self._blocks.called, max_tokens=self._max_tokens)
        return {"stop_reason": reason, "stop_sequence": completion.stopped_by if reason == "stop_sequence" else None}

    async def _remember(self, completion: Completion) -> None:
        """Keep the answer's ids, before its client can send the next turn: if they say what the client was told, no more."""
        dialog = self._prompt.dialog
        # An unfinished call was left out, or calls after the first may have been.
        cut = self._parser.cut or (self._blocks.called and not dialog.parallel and dialog.forced is None)
        if not self._prompt.begun and not cut:
            await asyncio.to_thread(dialog.remember, self._blocks.message(), completion)
