"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from radixkv.engine.options import WILL_CONTINUE
from radixkv_service.chat_reply import ChatReply
from radixkv_service.dialog import Dialog, open_dialog
from radixkv_service.documents import ERRORS, STREAM
from radixkv_service.errors import Problem, bad_request
from radixkv_service.generation import (
    check_model,
    ignored_header,
    namespace_of,
    options_of,
    sampling_of,
    service_of,
    structure_of,
)
from radixkv_service.openai_answers import ChatCompletion
from radixkv_service.openai_models import ChatRequest, refuse_unsupported
from radixkv_service.run import Job, Run
from radixkv_service.service import Service
from radixkv_service.streaming import EventStream, openai_error

__all__ = ["create_chat_completion", "router"]

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={**ERRORS, **STREAM})
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, whole or streamed."""
    service = service_of(request)
    model = check_model(service, body.model)
    refuse_unsupported(body)
    dialog = await asyncio.to_thread(open_dialog, service, request, body, namespace_of(service, request, body))
    run = Run(service, request)
    first = await run.start(_jobs(service, request, body, dialog))
    reply = ChatReply(service, body, model, dialog)
    headers = {"x-radixkv-cached-tokens": str(first.cached_tokens), **ignored_header(body)}
    if body.stream:

        def failed(problem: Problem) -> bytes:
            dialog.undo()  # before the client knows, and asks again
            return openai_error(problem)

        return EventStream(run, reply.events(run), headers, failed)
    try:
        answer = await reply.whole(run)
    finally:
        run.close()
    return Response(answer.model_dump_json(), 200, headers, "application/json")


def _jobs(service: Service, request: Request, body: ChatRequest, dialog: Dialog) -> list[Job]:
    """One job a choice; they share the prompt, and so its cached prefix."""
    num = body.n or 1
    if num > service.settings.max_choices:
        raise bad_request(f"n={num}: at most {service.settings.max_choices} answers a request (max_choices)", "n")
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs: needs logprobs=true", "top_logprobs")
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    structure = structure_of(body.response_format)
    if structure is not None and dialog.forced is not None:
        raise bad_request("response_format: an answer that must be a call of a tool has no other form", "response_format")
    structure = dialog.forced or structure
    again = dialog.turn is not None or any(message.role == "assistant" for message in body.messages)
    tag = WILL_CONTINUE if again else 0
    options = options_of(service, request, body, len(dialog.prompt), tag)
    options = replace(options, retain_at_end=dialog.keep(options.retention))

    def job(index: int) -> Job:
        length = len(dialog.prompt)
        params = sampling_of(service, body, length, max_tokens=limit, logprobs=logprobs, index=index, structure=structure)
        return Job(dialog.prompt, params, options)

    return [job(index) for index in range(num)]
