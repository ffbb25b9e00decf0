"""GET /v1/models and /v1/models/{id}: the one model that is served."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.api.docs import ERRORS
from service.api.errors import UnknownModel
from service.api.schemas import Model, ModelList
from service.lifecycle import Service

router = APIRouter(prefix="/v1/models", responses=ERRORS)


@router.get("")
async def list_models(http: Request) -> ModelList:
    return ModelList(data=[_model(http.app.state.service)])


@router.get("/{id:path}")  # hub ids have a slash
async def get_model(http: Request, id: str) -> Model:
    model = _model(http.app.state.service)
    if id != model.id:
        raise UnknownModel(id, model.id)
    return model


def _model(service: Service) -> Model:
    backend = service.backend()
    return Model(id=service.name, created=backend.created, max_model_len=backend.context)
