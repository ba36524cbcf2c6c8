"""Probes and the summary. They never wait for the engine, so they answer while it is saturated.

- live: the process runs and its workers make progress; failing it asks for a restart.
- startup: models are loaded and warm.
- ready: new work is welcome; fails while starting and from the first moment of a drain.

HEAD is answered too: uptime monitors ask with it.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from api.service import Service, service_of

router = APIRouter(tags=["health"])

_RETRY_S = "2"


def _answer(ok: bool, body: dict[str, Any]) -> JSONResponse:
    headers = {} if ok else {"Retry-After": _RETRY_S}
    return JSONResponse(body, status_code=200 if ok else 503, headers=headers)


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Summary: status, models, queue")
async def health(request: Request) -> JSONResponse:
    """200 with what an operator looks at first; 503 while not ready."""
    service = service_of(request)
    return _answer(service.is_ready, service.summary())


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", summary="Liveness")
async def live(request: Request) -> JSONResponse:
    """200 while the process and its workers make progress."""
    problem = service_of(request).stalled()
    return _answer(problem is None, {"status": "ok"} if problem is None else {"status": problem})


@router.head("/health/startup", include_in_schema=False)
@router.get("/health/startup", summary="Startup")
async def startup(request: Request) -> JSONResponse:
    """200 once the models are warm."""
    service = service_of(request)
    return _answer(service.has_started, {"status": service.phase})


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready", summary="Readiness")
async def ready(request: Request) -> JSONResponse:
    """200 while new work is welcome."""
    service: Service = service_of(request)
    return _answer(service.is_ready, {"status": service.phase})
