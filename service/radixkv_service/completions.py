"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from time import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from radixkv.tokens import Tokens
from radixkv_service.documents import ERRORS, STREAM
from radixkv_service.errors import bad_request, clean
from radixkv_service.generation import (
    check_model,
    ignored_header,
    live_usage,
    options_of,
    reason_of,
    sampling_of,
    service_of,
    structure_of,
    usage_of,
)
from radixkv_service.openai_answers import CompletionChoice, TextCompletion, Usage
from radixkv_service.openai_models import CompletionRequest, refuse_unsupported
from radixkv_service.prompt_limits import refuse_long_ids, refuse_long_text
from radixkv_service.run import Job, Run
from radixkv_service.service import Service
from radixkv_service.streaming import DONE, EventStream, event

if TYPE_CHECKING:
    from radixkv.engine.output import Chunk

__all__ = ["create_completion", "prompts_of", "router"]

router = APIRouter(tags=["OpenAI"])

_DEFAULT_TOKENS = 16  # of OpenAI


@router.post("/v1/completions", response_model=TextCompletion, responses={**ERRORS, **STREAM})
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one prompt or several, whole or streamed."""
    service = service_of(request)
    model = check_model(service, body.model)
    refuse_unsupported(body)
    prompts = await asyncio.to_thread(prompts_of, service, body)
    run = Run(service, request)
    first = await run.start(_jobs(service, request, body, prompts))
    reply = _Reply(service, body, model, prompts)
    headers = {"x-radixkv-cached-tokens": str(first.cached_tokens), **ignored_header(body)}
    if body.stream:
        return EventStream(run, reply.events(run), headers)
    try:
        answer = await reply.whole(run)
    finally:
        run.close()
    return Response(answer.model_dump_json(), 200, headers, "application/json")


def prompts_of(service: Service, body: CompletionRequest) -> list[Tokens]:
    """Every prompt's ids: a text, ids, or a list of either.

    Raises:
        ProblemError: no prompt, more than may be, or one that is too long. TokenError: unusable ids.
    """
    several = _listed(body.prompt)
    if not several:
        raise bad_request("prompt: at least one is needed", "prompt")
    if len(several) * (body.n or 1) > service.settings.max_choices:
        limit = service.settings.max_choices
        raise bad_request(f"prompt: at most {limit} answers a request, prompts times n (max_choices)", "prompt")
    tokenizer = service.engine.tokenizer
    for one in several:
        if isinstance(one, str):
            refuse_long_text(service, one, "prompt")
        else:
            refuse_long_ids(service, len(one), "prompt")
    return [Tokens(tokenizer.encode(one) if isinstance(one, str) else one) for one in several]


def _listed(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """One prompt as a list of one."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [one for one in prompt if isinstance(one, int)]
    return [ids] if ids else [one for one in prompt if not isinstance(one, int)]


def _jobs(service: Service, request: Request, body: CompletionRequest, prompts: Sequence[Tokens]) -> list[Job]:
    structure = structure_of(body.response_format)
    limit = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens

    def job(prompt: Tokens, index: int) -> Job:
        options = options_of(service, request, body, len(prompt))
        params = sampling_of(
            service, body, len(prompt), max_tokens=limit, logprobs=body.logprobs, index=index, structure=structure
        )
        return Job(prompt, params, options)

    return [job(prompt, index) for prompt in prompts for index in range(body.n or 1)]


class _Reply:
    """One request's answer, in either form."""

    def __init__(self, service: Service, body: CompletionRequest, model: str, prompts: Sequence[Tokens]) -> None:
        self._texts = service.token_texts
        self._num = body.n or 1
        self._num_prompt = sum(map(len, prompts))
        self._logprobs = body.logprobs is not None
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._live = bool(body.stream_options and body.stream_options.continuous_usage_stats)
        self._echo = [""] * len(prompts)
        if body.echo:
            given = zip(_listed(body.prompt), prompts, strict=True)
            decode = service.engine.tokenizer.decode
            self._echo = [clean(one) if isinstance(one, str) else decode(ids.array, False) for one, ids in given]
        self._head: Mapping[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "created": int(time()),
            "model": model,
            "system_fingerprint": service.fingerprint,
        }

    async def whole(self, run: Run) -> TextCompletion:
        """The answer at once."""
        completions = await run.finish()
        choices = []
        for index, one in enumerate(completions):
            echo = self._echo[index // self._num]
            choices.append(
                CompletionChoice(
                    index=index,
                    text=echo + one.text,
                    logprobs=self._texts.completion(one.logprobs or (), 0) if self._logprobs else None,
                    finish_reason=reason_of(one),
                    stop_reason=one.stopped_by,
                )
            )
        return TextCompletion(**self._head, choices=choices, usage=self._whole_usage(run))

    def _whole_usage(self, run: Run) -> Usage:
        ordered = [run.completions[index] for index in sorted(run.completions)]
        return usage_of([ordered[at : at + self._num] for at in range(0, len(ordered), self._num)])

    async def events(self, run: Run) -> AsyncIterator[bytes]:
        """The answer as it is made."""
        cached: dict[int, int] = {}
        offsets: dict[int, int] = {}
        output = 0
        async for index, chunk in run.chunks():
            output += chunk.token_id is not None
            prompt = index // self._num
            cached[prompt] = min(cached.get(prompt, chunk.cached_tokens), chunk.cached_tokens)
            text = (self._echo[prompt] if index not in offsets else "") + chunk.text
            offset = offsets.setdefault(index, 0)
            choice = self._choice(index, text, offset, chunk)
            if chunk.logprob is not None:
                offsets[index] += len(self._texts(chunk.logprob.token_id)[0])
            if text or choice.finish_reason is not None or choice.logprobs is not None:
                usage = live_usage(self._num_prompt, sum(cached.values()), output) if self._live else None
                yield event(TextCompletion(**self._head, choices=[choice], usage=usage))
        if self._usage:
            yield event(TextCompletion(**self._head, choices=[], usage=self._whole_usage(run)))
        yield DONE

    def _choice(self, index: int, text: str, offset: int, chunk: Chunk) -> CompletionChoice:
        shown = self._logprobs and chunk.logprob is not None
        choice = CompletionChoice(index=index, text=text, logprobs=None, finish_reason=None)
        if shown and chunk.logprob is not None:
            choice.logprobs = self._texts.completion([chunk.logprob], offset)
        if chunk.completion is not None:
            choice.finish_reason = reason_of(chunk.completion)
            choice.stop_reason = chunk.completion.stopped_by
        return choice
