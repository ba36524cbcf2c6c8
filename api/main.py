"""create_app(settings): the one place that wires everything, and the lifespan.

Start: settings -> bundles (sha256) -> sessions -> warm-up and calibration -> ready, in a thread, so that
``/health/live`` answers at once. Stop: readiness fails, the listener goes on for the grace period, accepted
requests finish, the batchers drain, telemetry flushes last. ``api/server.py`` runs it and handles signals.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from api.access import Access, SecurityHeaders
from api.cgroup import usable_cores
from api.errors import AsrError, BundleError, SettingsError, from_validation, public, to_response
from api.registry import open_registry
from api.routes import docs, health, live, models, openai, root, transcribe
from api.schemas import ERRORS
from api.service import Service
from api.settings import Settings
from api.telemetry import Telemetry, current_record, instrument, metrics_response

_log = structlog.get_logger("api.main")


def create_app(
    settings: Settings,
    *,
    telemetry: Telemetry | None = None,
    on_failed_start: Callable[[], None] | None = None,
) -> FastAPI:
    """The application. ``on_failed_start`` is called when a model is refused, after it was logged."""
    keys = settings.load_keys()
    settings.check_spool_dir()
    telemetry = telemetry or Telemetry(
        version=app_version(),
        commit=os.environ.get("ASR_REVISION") or "unknown",
        environment=settings.env,
        environ=os.environ,
    )
    decode_threads = settings.decode_threads or min(4, usable_cores())
    service = Service(settings, telemetry, decode_threads)
    telemetry.metrics.ready.set_function(lambda: float(service.is_ready))
    app = FastAPI(
        title="ASR platform",
        version=app_version(),
        description="Speech to text. Errors have one form on every route.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json" if settings.docs_enabled else None,
        lifespan=_lifespan(service, on_failed_start),
        responses=ERRORS,
        # Its own spans and metrics would be second ones beside ours; it would ask for every request.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.service = service
    for module in (transcribe, openai):
        # Taken over and not included: FastAPI searches an included router twice, and these are asked most.
        app.router.routes.extend(module.router.routes)
    for module in (root, health, models, live):
        app.include_router(module.router)
    if settings.docs_enabled:
        app.include_router(docs.router)
    if keys:
        app.openapi = partial(docs.with_keys, app.openapi)  # type: ignore[method-assign]
    if settings.metrics_enabled:
        _add_metrics(app, telemetry)
    _add_error_handlers(app)
    app.add_middleware(
        Access,
        keys=keys,
        rate_limit_per_minute=settings.rate_limit_per_minute,
        check_room=service.check_room,
        origins=settings.cors_origins,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            # The origins are listed, so any header may come: the official clients send a dozen of their own.
            allow_headers=["*"],
            expose_headers=[
                "x-request-id",
                "x-should-retry",
                "server-timing",
                "retry-after",
                "retry-after-ms",
            ],
        )
    app.add_middleware(SecurityHeaders, is_draining=lambda: service.is_draining)
    instrument(app, telemetry, to_response)
    return app


def app_version() -> str:
    """``ASR_VERSION``, which the images set, or the version of the installed package."""
    if given := os.environ.get("ASR_VERSION"):
        return given
    try:
        return version("asr-platform")
    except PackageNotFoundError:
        return "0.0.0+source"


def _lifespan(
    service: Service, on_failed_start: Callable[[], None] | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    telemetry = service.telemetry

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(service, on_failed_start))
        try:
            yield
        finally:
            service.drain()
            await asyncio.wait({loading})
            await service.close()
            await asyncio.to_thread(telemetry.shutdown)
            _log.info("stopped")

    return lifespan


class _ToldToStop(Exception):  # noqa: N818  it is not an error
    """A stop came while the models were loading."""


async def _load(service: Service, on_failed_start: Callable[[], None] | None) -> None:
    def go_on() -> None:
        if service.is_draining:
            raise _ToldToStop

    try:
        registry = await open_registry(service.settings, service.telemetry, go_on)
    except _ToldToStop:
        _log.info("start_broken_off")
        return
    except Exception as error:
        service.phase, service.failure = "failed", str(error)
        if isinstance(error, BundleError):
            _log.error("model_refused", problem=str(error))
        elif isinstance(error, SettingsError):
            _log.error("start_failed", problem=str(error))
        else:
            service.failure = f"{type(error).__name__}: {error}"
            _log.error("start_failed", problem=service.failure, exc_info=error)
        if on_failed_start is not None:
            on_failed_start()
        return
    service.opened(registry)
    _log.info("ready", models=[model.name for model in registry.models()])


def _add_metrics(app: FastAPI, telemetry: Telemetry) -> None:
    @app.get("/metrics", tags=["health"], summary="Prometheus metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        return metrics_response(telemetry, request)


def _add_error_handlers(app: FastAPI) -> None:
    async def known(_: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            error = from_validation(error.errors())
        record = current_record()
        if record is not None and isinstance(error, AsrError | MemoryError):
            shown = public(error)
            record.failed(shown.code, shown.status)
        return to_response(error)

    for kind in (AsrError, RequestValidationError, HTTPException, MemoryError):
        app.add_exception_handler(kind, known)
