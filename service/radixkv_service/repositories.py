"""/v1/repositories: questions about a source tree on the server, whose files are computed once (docs/sessions.md).

stream   repository.computed (which file costs what) ─▶ repository.text ... ─▶ repository.answer ─▶ [DONE]
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from time import time
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from radixkv_service.auth import cache_salt_of
from radixkv_service.documents import ERRORS, STREAM
from radixkv_service.errors import bad_request, clean
from radixkv_service.generation import (
    check_model,
    ignored_header,
    options_of,
    reason_of,
    sampling_of,
    service_of,
    usage_of,
)
from radixkv_service.openai_models import refuse_unsupported
from radixkv_service.prompt_limits import refuse_long_text
from radixkv_service.record import record_of
from radixkv_service.repository_models import (
    AskRequest,
    DeletedRepository,
    FileCostView,
    FileView,
    OpenRepository,
    RefreshedRepository,
    RepositoryAnswerView,
    RepositoryComputed,
    RepositoryList,
    RepositoryText,
    RepositoryView,
    SkippedView,
    WholeRepository,
)
from radixkv_service.repository_store import OpenedRepository
from radixkv_service.run import Job, Run
from radixkv_service.streaming import DONE, EventStream, event

if TYPE_CHECKING:
    from radixkv.engine.output import Completion
    from radixkv.repository import Packing

__all__ = [
    "ask_repository",
    "delete_repository",
    "get_repository",
    "list_repositories",
    "open_repository",
    "refresh_repository",
    "router",
]

router = APIRouter(tags=["repositories"])

_ERRORS = {**ERRORS, 403: {**ERRORS[400], "description": "Not inside a --repository-root, or none is set."}}


@router.post("/v1/repositories", response_model=WholeRepository, responses=_ERRORS)
async def open_repository(body: OpenRepository, request: Request) -> WholeRepository:
    """Read a source tree."""
    service, tenant = service_of(request), record_of(request).tenant
    namespace = cache_salt_of(tenant if service.settings.isolate_tenants else "", body.cache_salt)
    open_one = partial(service.repositories.open, service.engine, tenant, body.path, namespace=namespace)
    return _whole(await asyncio.to_thread(open_one, budget_tokens=body.budget_tokens, exclude=body.exclude))


@router.get("/v1/repositories", response_model=RepositoryList, responses=_ERRORS)
async def list_repositories(request: Request) -> RepositoryList:
    """The tenant's source trees."""
    opened = service_of(request).repositories.all_of(record_of(request).tenant)
    return RepositoryList(data=[_view(one) for one in opened])


@router.get("/v1/repositories/{repository_id}", response_model=WholeRepository, responses=_ERRORS)
async def get_repository(repository_id: str, request: Request) -> WholeRepository:
    """A source tree: its files in the order of the prompt, and those left out."""
    return _whole(_opened(request, repository_id))


@router.post("/v1/repositories/{repository_id}/refresh", response_model=RefreshedRepository, responses=_ERRORS)
async def refresh_repository(repository_id: str, request: Request) -> RefreshedRepository:
    """Read a source tree again; nothing is computed until the next question."""
    service, tenant = service_of(request), record_of(request).tenant
    changed = await asyncio.to_thread(service.repositories.refresh, repository_id, tenant)
    return RefreshedRepository(
        **_view(_opened(request, repository_id)).model_dump(), changed=[clean(one) for one in changed]
    )


@router.post("/v1/repositories/{repository_id}/ask", response_model=RepositoryAnswerView, responses={**_ERRORS, **STREAM})
async def ask_repository(repository_id: str, body: AskRequest, request: Request) -> Response:
    """Answer a question about a source tree as it was last read, whole or streamed."""
    service, opened = service_of(request), _opened(request, repository_id)
    model = check_model(service, body.model)
    refuse_unsupported(body)
    if (body.n or 1) > 1:
        raise bad_request(f"n={body.n}: a question has one answer", "n")
    refuse_long_text(service, body.question, "question")
    packing = opened.tree.packing
    prompt = await asyncio.to_thread(opened.tree.prompt, body.question, packing)
    plain = body if body.temperature is not None else body.model_copy(update={"temperature": 0.0})
    params = sampling_of(service, plain, len(prompt), max_tokens=body.max_tokens, logprobs=None)
    options = replace(options_of(service, request, body, len(prompt)), namespace=opened.tree.namespace)
    run = Run(service, request)
    first = await run.start([Job(prompt, params, options)])
    reply = _Reply(opened, packing, model)
    headers = {"x-radixkv-cached-tokens": str(first.cached_tokens), **ignored_header(body)}
    if body.stream:
        return EventStream(run, reply.events(run), headers)
    try:
        (completion,) = await run.finish()
    finally:
        run.close()
    return Response(reply.whole(completion).model_dump_json(), 200, headers, "application/json")


@router.delete("/v1/repositories/{repository_id}", response_model=DeletedRepository, responses=_ERRORS)
async def delete_repository(repository_id: str, request: Request) -> DeletedRepository:
    """Forget a source tree; its files on disk stay."""
    service_of(request).repositories.remove(repository_id, record_of(request).tenant)
    return DeletedRepository(id=repository_id)


class _Reply:
    """One question's answer, in either form."""

    def __init__(self, opened: OpenedRepository, packing: Packing, model: str) -> None:
        self._tree = opened.tree
        self._packing = packing
        self._model = model
        self._id = f"ans_{secrets.token_hex(12)}"
        self._created = int(time())

    def whole(self, completion: Completion) -> RepositoryAnswerView:
        return RepositoryAnswerView(
            id=self._id,
            created=self._created,
            model=self._model,
            answer=completion.text,
            finish_reason=reason_of(completion),
            computed=self._computed(completion.cached_tokens),
            usage=usage_of([[completion]]),
        )

    async def events(self, run: Run) -> AsyncIterator[bytes]:
        begun = False
        async for _, chunk in run.chunks():
            if not begun:
                begun = True
                yield event(RepositoryComputed(computed=self._computed(chunk.cached_tokens)))
            if chunk.text:
                yield event(RepositoryText(text=chunk.text))
            if chunk.completion is not None:
                yield event(self.whole(chunk.completion))
        yield DONE

    def _computed(self, num_cached: int) -> list[FileCostView]:
        costs = self._tree.computed(num_cached, self._packing)
        return [
            FileCostView(path=clean(one.path), num_tokens=one.num_tokens, computed_tokens=one.computed_tokens)
            for one in costs
        ]


def _opened(request: Request, repository_id: str) -> OpenedRepository:
    return service_of(request).repositories.get(repository_id, record_of(request).tenant)


def _view(opened: OpenedRepository) -> RepositoryView:
    tree, packing = opened.tree, opened.tree.packing
    return RepositoryView(
        id=opened.id,
        created=opened.created,
        path=opened.path,
        budget_tokens=tree.budget_tokens,
        num_files=len(packing.files),
        num_tokens=packing.num_tokens,
        num_skipped=len(packing.skipped),
    )


def _whole(opened: OpenedRepository) -> WholeRepository:
    packing = opened.tree.packing
    files = [FileView(path=clean(one.path), num_tokens=len(one.tokens)) for one in packing.files]
    skipped = [SkippedView(path=clean(one.path), reason=clean(one.reason)) for one in packing.skipped]
    return WholeRepository(**_view(opened).model_dump(), files=files, skipped=skipped)
