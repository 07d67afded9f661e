"""From a request's fields to what the engine takes: prompt, sampling, options."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from fastapi import Request as HttpRequest

from radixkv.engine.options import RequestOptions
from radixkv.engine.sampling import SamplingParams
from radixkv.engine.structure import Structure
from radixkv.errors import PromptTooLong
from radixkv.retention import Retain
from radixkv_service.auth import cache_salt_of
from radixkv_service.errors import Problem, ProblemError, bad_request
from radixkv_service.openai_answers import PromptTokensDetails, Usage
from radixkv_service.openai_models import Request, ResponseFormat
from radixkv_service.record import record_of
from radixkv_service.service import Service

if TYPE_CHECKING:
    from radixkv.engine.output import Completion

__all__ = [
    "check_model",
    "ignored_header",
    "live_usage",
    "namespace_of",
    "options_of",
    "reason_of",
    "sampling_of",
    "service_of",
    "structure_of",
    "usage_of",
]

_KEEP = {"24h": (80, 86_400.0), "in_memory": (50, 600.0), "in-memory": (50, 600.0)}
"""prompt_cache_retention -> priority and seconds of the whole prompt's retention."""


def service_of(request: HttpRequest) -> Service:
    """The service behind a route."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def check_model(service: Service, name: str | None) -> str:
    """The name that an answer carries: the one that was asked for.

    Raises:
        ProblemError: 404, no such model here.
    """
    names = service.settings.names
    if name is None:
        return names[0]
    if name not in names:
        message = f"the model {name!r} does not exist here; served: {', '.join(names)}"
        raise ProblemError(Problem(404, "invalid_request_error", message, "model", "model_not_found"))
    return name


def sampling_of(
    service: Service,
    body: Request,
    num_prompt: int,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    index: int = 0,
    structure: Structure | None = None,
) -> SamplingParams:
    """How the answer of this index is drawn; OpenAI's defaults, which are not greedy.

    Args:
        service: knows how long an answer may be.
        body: the request.
        num_prompt: tokens of its prompt.
        max_tokens: as asked for; None: as many as fit.
        logprobs: the likeliest tokens to report.
        index: of the answer among `n`; each has a seed of its own.
        structure: the form of the answer.

    Raises:
        PromptTooLong, ConfigError: of the engine.
    """
    room = service.max_tokens - num_prompt
    if room < min(1, 1 if max_tokens is None else max_tokens):
        raise PromptTooLong(num_prompt, service.max_tokens)
    temperature = 1.0 if body.temperature is None else body.temperature
    values: dict[str, Any] = {
        "max_tokens": room if max_tokens is None else min(max_tokens, room),
        "temperature": temperature if temperature >= 1e-3 else 0.0,
        "top_p": body.top_p,
        "top_k": max(body.top_k, 0) if body.top_k is not None else None,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": _bias(body.logit_bias),
        "min_tokens": body.min_tokens,
        "seed": None if body.seed is None else (body.seed + index + 2**63) % 2**64 - 2**63,
        "stop": body.stops(),
        "stop_token_ids": frozenset(body.stop_token_ids or ()),
        "ignore_eos": body.ignore_eos,
        "logprobs": logprobs,
        "structure": structure,
    }
    return SamplingParams(**{name: value for name, value in values.items() if value is not None})


def _bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if not bias:
        return None
    wrong = next((key for key in bias if not (key.isascii() and key.isdecimal() and len(key) < 11)), None)
    if wrong is not None:
        raise bad_request(f"logit_bias: {wrong!r} is no token id", "logit_bias")
    return {int(key): value for key, value in bias.items()}


def namespace_of(service: Service, request: HttpRequest, body: Request) -> str:
    """Where a request's prefixes are: the tenant's, and the salt's of that."""
    tenant = record_of(request).tenant if service.settings.isolate_tenants else ""
    return cache_salt_of(tenant, body.cache_salt)


def options_of(service: Service, request: HttpRequest, body: Request, num_prompt: int, tag: int = 0) -> RequestOptions:
    """What a request asks of the cache and the scheduler.

    `priority` is turned around, because clients of vLLM send lower numbers for what is more urgent.

    Raises:
        ProblemError: a header that is no number. ConfigError: a value that cannot be.
    """
    keep = _KEEP.get(body.prompt_cache_retention or "")
    return RequestOptions(
        namespace=namespace_of(service, request, body),
        tenant=record_of(request).tenant,
        priority=-(body.priority or 0),
        deadline_s=_deadline(service, request, body),
        affinity=body.prompt_cache_key or "",
        retention=(Retain(0, num_prompt, keep[0], keep[1]),) if keep and num_prompt else (),
        tag=tag,
    )


def structure_of(form: ResponseFormat | None) -> Structure | None:
    """The form of the answer that `response_format` asks for.

    Raises:
        ProblemError: a schema is missing. StructureError: one that cannot be enforced.
    """
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Structure.json_object()
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise bad_request("response_format: json_schema needs a schema", "response_format.json_schema.schema")
    return Structure.json_schema(form.json_schema.schema_)


def _deadline(service: Service, request: HttpRequest, body: Request) -> float | None:
    """Seconds this request may take: its field, its header x-request-timeout, or the server's setting."""
    if body.timeout is not None:
        return body.timeout
    header = request.headers.get("x-request-timeout")
    if header is None:
        return service.settings.request_timeout
    try:
        seconds = float(header)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise bad_request("x-request-timeout: seconds, more than 0", "x-request-timeout")
    return seconds


def reason_of(completion: Completion) -> Literal["stop", "length"]:
    """Why an answer ended, in OpenAI's words; cancelled ones are errors, and come nowhere near."""
    return "stop" if completion.finish_reason == "stop" else "length"


def ignored_header(body: Request) -> dict[str, str]:
    """The header that names the fields nobody read, those of the objects inside left out."""
    extra = islice(body.model_extra or (), 1024)  # a body may have any number of them
    names = [name if name.isidentifier() and name.isascii() and len(name) <= 64 else "?" for name in extra]
    return {"x-radixkv-ignored": ", ".join(sorted(set(names))[:32])} if names else {}


def usage_of(groups: Sequence[Sequence[Completion]]) -> Usage:
    """The usage of answers, grouped by prompt: a prompt counts once, however many answers it has."""
    prompt = sum(group[0].prompt_tokens for group in groups)
    cached = sum(min(one.cached_tokens for one in group) for group in groups)
    written = sum(max(one.written_tokens for one in group) for group in groups)
    output = sum(len(one.token_ids) for group in groups for one in group)
    return _usage(prompt, cached, output, written)


def live_usage(num_prompt: int, num_cached: int, num_output: int) -> Usage:
    """The usage so far."""
    return _usage(num_prompt, num_cached, num_output, 0)


def _usage(prompt: int, cached: int, output: int, written: int) -> Usage:
    details = PromptTokensDetails(cached_tokens=cached, created_cache_tokens=written)
    return Usage(prompt_tokens=prompt, completion_tokens=output, total_tokens=prompt + output, prompt_tokens_details=details)
