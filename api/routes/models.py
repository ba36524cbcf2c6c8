"""What is loaded: our own listing, OpenAI's, and the languages."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from api.errors import ModelNotFoundError
from api.schemas import LanguageBody, LanguagesBody, ModelBody, ModelsBody
from api.service import WHISPER_ALIAS, service_of

router = APIRouter(tags=["models"])


@router.get("/models", summary="Loaded models", response_model=ModelsBody)
async def models(request: Request) -> ModelsBody:
    """Each loaded model with its card's facts and what calibration chose for it."""
    service = service_of(request)
    default = service.settings.default_model_name
    bodies = []
    for model in service.models():
        manifest = model.bundle.manifest
        bodies.append(
            ModelBody(
                name=model.name,
                version=manifest.version,
                default=model.name == default,
                languages=list(manifest.languages),
                sample_rate_hz=manifest.sample_rate_hz,
                max_window_s=manifest.max_window_s,
                graph=model.graph,
                provider=model.provider,
                parameters=manifest.parameters,
                decoder=manifest.decoder,
                licence=manifest.licence,
                source=manifest.source.model_dump(),
                evaluation=[entry.model_dump() for entry in manifest.evaluation],
                engine=model.describe(),
            )
        )
    return ModelsBody(models=bodies, default=default, aliases={WHISPER_ALIAS: default})


@router.get("/languages", summary="Languages", response_model=LanguagesBody)
async def languages(request: Request) -> LanguagesBody:
    """Each language with the models that transcribe it."""
    by_language: dict[str, list[str]] = {}
    for model in service_of(request).models():
        for code in model.bundle.manifest.languages:
            by_language.setdefault(code, []).append(model.name)
    bodies = [LanguageBody(code=code, models=names) for code, names in sorted(by_language.items())]
    return LanguagesBody(languages=bodies)


@router.get("/v1/models", summary="Loaded models, OpenAI's form", tags=["openai"])
async def openai_models(request: Request) -> dict[str, Any]:
    """Loaded models and the alias ``whisper-1``."""
    service = service_of(request)
    names = [model.name for model in service.models()]
    return {"object": "list", "data": [_card(service.created_s, name) for name in [*names, WHISPER_ALIAS]]}


@router.get("/v1/models/{model_id}", summary="One model, OpenAI's form", tags=["openai"])
async def openai_model(request: Request, model_id: str) -> dict[str, Any]:
    """One loaded model, by name or alias."""
    service = service_of(request)
    names = [model.name for model in service.models()]
    if model_id not in (*names, WHISPER_ALIAS):
        raise ModelNotFoundError(model_id[:100], names)
    return _card(service.created_s, model_id)


def _card(created_s: int, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created_s, "owned_by": "asr-platform"}
