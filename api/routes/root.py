"""``GET /``: what this is and where everything lies."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from api.service import service_of

router = APIRouter(tags=["info"])


@router.get("/", summary="Information and links")
async def root(request: Request) -> dict[str, Any]:
    """Name, version, phase, and the routes."""
    service = service_of(request)
    settings = service.settings
    links = {
        "transcribe": "/transcribe",
        "transcribe_batch": "/transcribe/batch",
        "openai": "/v1/audio/transcriptions",
        "models": "/models",
        "languages": "/languages",
        "health": "/health",
    }
    if settings.docs_enabled:
        links |= {"docs": "/docs", "openapi": "/openapi.json"}
    if settings.metrics_enabled:
        links["metrics"] = "/metrics"
    return {
        "name": request.app.title,
        "version": request.app.version,
        "status": service.phase,
        "default_model": settings.default_model_name,
        "limits": {
            "max_upload_bytes": settings.max_upload_bytes,
            "max_audio_s": settings.max_audio_s,
            "max_batch_files": settings.max_batch_files,
            "max_beam": settings.max_beam,
            "max_hotwords": settings.max_hotwords,
            "max_streams": settings.max_streams,
        },
        "links": links,
        "websockets": {"openai_realtime": "/v1/realtime", "vosk": "/vosk"},
    }
