"""The server itself: is it there, is it ready, what does it count, forget everything."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.responses import Response

from radixkv import __version__ as core_version
from radixkv_service.documents import ADMIN_ERRORS
from radixkv_service.generation import service_of

__all__ = [
    "Flushed",
    "Health",
    "Ready",
    "Reset",
    "Version",
    "flush_cache",
    "health",
    "metrics",
    "ready",
    "reset_prefix_cache",
    "router",
    "version",
]

router = APIRouter(tags=["server"])

_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Health(BaseModel):
    """Where the server is in its life."""

    status: Literal["loading", "ok", "draining", "failed"]


class Ready(BaseModel):
    """Whether requests are answered."""

    ready: bool
    status: Literal["loading", "ok", "draining", "failed"]


class Version(BaseModel):
    """The version of radixkv."""

    version: str


class Reset(BaseModel):
    """Whether the cache is empty now."""

    success: bool


class Flushed(Reset):
    """As `Reset`, and how many pages stay because running requests hold them."""

    pages_left: int


@router.get("/health", response_model=Health, responses={503: {"model": Health}})
async def health(request: Request) -> Response:
    """200 as long as the process can do its work, or will be able to."""
    service = service_of(request)
    alive = service.status != "failed"
    return JSONResponse({"status": service.status}, 200 if alive else 503)


@router.get("/ready", response_model=Ready, responses={503: {"model": Ready}})
async def ready(request: Request) -> Response:
    """200 when requests are answered."""
    service = service_of(request)
    problem = service.unavailable()
    headers = None if problem is None else dict(problem.headers)
    return JSONResponse({"ready": problem is None, "status": service.status}, 200 if problem is None else 503, headers)


@router.get("/version", response_model=Version)
async def version() -> Version:
    """The version of radixkv."""
    return Version(version=core_version)


@router.get("/metrics", response_class=Response, responses={200: {"content": {_TEXT: {"schema": {"type": "string"}}}}})
async def metrics(request: Request) -> Response:
    """Counts, for Prometheus."""
    return Response(await service_of(request).scrape(), 200, {"content-type": _TEXT})


@router.get("/flush_cache", response_model=Flushed, responses=ADMIN_ERRORS)
@router.post("/flush_cache", response_model=Flushed, responses=ADMIN_ERRORS)
async def flush_cache(request: Request) -> Flushed:
    """Forget everything in every namespace."""
    left = await service_of(request).front.call(lambda engine: engine.cache.flush())
    return Flushed(success=left == 0, pages_left=left)


@router.post("/reset_prefix_cache", response_model=Reset, responses=ADMIN_ERRORS)
async def reset_prefix_cache(request: Request) -> Reset:
    """Forget everything in every namespace; vLLM's name."""
    left = await service_of(request).front.call(lambda engine: engine.cache.flush())
    return Reset(success=left == 0)
