"""The application: routes, the gate in front of them, and errors in the API's own form."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from radixkv.errors import RadixKVError
from radixkv_service import __version__, admin, chat, completions, messages, models, repositories, sessions, tokenization
from radixkv_service.anthropic_errors import MessagesForm
from radixkv_service.errors import Problem, ProblemError, problem_of, problem_of_status, problem_of_validation
from radixkv_service.gate import Gate
from radixkv_service.record import record_of
from radixkv_service.service import Service
from radixkv_service.session_turns import TurnGuard

__all__ = ["create_app", "problem_response"]

log = logging.getLogger("radixkv.service")


def create_app(service: Service) -> FastAPI:
    """The ASGI application over a service; it loads the model at its start, and closes it at its end."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(title="radixkv", version=__version__, lifespan=life, redoc_url=None)
    app.state.service = service
    for part in (chat, completions, messages, sessions, repositories, models, tokenization, admin):
        app.include_router(part.router)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_status)
    for kind in (RadixKVError, ProblemError, RecursionError):
        app.add_exception_handler(kind, _on_problem)
    app.add_middleware(Gate, service=service)
    app.add_middleware(TurnGuard)
    app.add_middleware(MessagesForm)
    return app


def problem_response(problem: Problem) -> Response:
    """A problem as a response."""
    return Response(problem.encode(), problem.status, dict(problem.headers), "application/json")


def _note(request: Request, problem: Problem) -> Response:
    record_of(request).note = problem.code or problem.kind
    return problem_response(problem)


def _on_problem(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    if problem.status == 500:
        log.error("id=%s failed", record_of(request).id, exc_info=error)
    return _note(request, problem)


def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _note(request, problem_of_validation(error.errors(), error.body))


def _on_status(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _note(request, problem_of_status(error.status_code, str(error.detail)))
