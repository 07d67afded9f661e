"""GET /v1/models."""

from __future__ import annotations

from fastapi import APIRouter, Request

from radixkv_service.documents import ERRORS
from radixkv_service.generation import check_model, service_of
from radixkv_service.openai_answers import Model, ModelList
from radixkv_service.service import Service

__all__ = ["get_model", "list_models", "router"]

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", response_model=ModelList, responses=ERRORS)
async def list_models(request: Request) -> ModelList:
    """Every name under which the model is served."""
    service = service_of(request)
    return ModelList(data=[_model(service, name) for name in service.settings.names])


@router.get("/v1/models/{model:path}", response_model=Model, responses=ERRORS)
async def get_model(model: str, request: Request) -> Model:
    """The model of a name."""
    service = service_of(request)
    return _model(service, check_model(service, model))


def _model(service: Service, name: str) -> Model:
    return Model(id=name, created=service.created, root=service.settings.model, max_model_len=service.max_tokens)
