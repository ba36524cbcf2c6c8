"""The Lambda function: `serverless.handler.handler(event, context)`.

One process answers one event at a time. The application with its models is made once, at the cold start, on
an event loop that lives as long as the process; every event runs on it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import MutableMapping
from contextlib import AsyncExitStack
from typing import Any

import structlog

from api.errors import NotReadyError, SettingsError
from api.main import create_app
from api.redaction import plain_keys
from api.service import Service
from api.settings import Settings, load_settings
from api.telemetry import configure_logging
from serverless.gateway import answer, is_http
from serverless.storage import ObjectStore, is_s3, open_store, transcribe_records

_log = structlog.get_logger("serverless.handler")


class Function:
    """The application, warm, and the loop it lives on."""

    def __init__(self, settings: Settings, *, output_prefix: str = "transcripts/") -> None:
        """Load and warm the models. Raises SettingsError, BundleError, NotReadyError."""
        if not output_prefix:
            raise SettingsError("ASR_OUTPUT_PREFIX: empty, every recording would be taken for a transcript")
        started_s = time.perf_counter()
        self.settings = settings
        self.output_prefix = output_prefix
        self.loop = asyncio.new_event_loop()
        self._store: ObjectStore | None = None
        self._stack = AsyncExitStack()
        self._app = create_app(settings)
        self.loop.run_until_complete(self._start())
        self.cold_start_s = time.perf_counter() - started_s
        _log.info("cold_start", seconds=round(self.cold_start_s, 3), models=list(settings.models))

    @property
    def service(self) -> Service:
        """What the routes use as well."""
        service: Service = self._app.state.service
        return service

    async def _start(self) -> None:
        await self._stack.enter_async_context(self._app.router.lifespan_context(self._app))
        while not self.service.is_ready:
            if self.service.phase == "failed":
                problem = self.service.failure
                await self._stack.aclose()
                raise NotReadyError(f"the models could not be loaded: {problem}")
            await asyncio.sleep(0.005)

    def __call__(self, event: MutableMapping[str, Any], _context: object = None) -> dict[str, Any]:
        """Answer one event. Raises ValueError for one of an unknown kind."""
        if is_http(event):
            return self.loop.run_until_complete(answer(self._app, event))
        if is_s3(event):
            return self.loop.run_until_complete(self._transcribe(event))
        raise ValueError(f"neither an API Gateway nor an S3 event: it has {sorted(event)[:8]}")

    async def _transcribe(self, event: MutableMapping[str, Any]) -> dict[str, Any]:
        if self._store is None:
            self._store = open_store()
        return await transcribe_records(
            event,
            self.service.transcriber(""),
            self._store,
            prefix=self.output_prefix,
            max_bytes=self.settings.max_upload_bytes,
        )

    def close(self) -> None:
        """Finish what runs, then let go of models and loop."""
        self.loop.run_until_complete(self._stack.aclose())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


def open_function() -> Function:
    """From the environment. The gateway reaches it from everywhere, so keys are asked for as on 0.0.0.0."""
    settings = load_settings(env_file=None, host=os.environ.get("ASR_HOST", "0.0.0.0"))  # noqa: S104  no socket
    configure_logging(
        log_format=settings.log_format,
        level=settings.log_level,
        log_text=settings.log_text,
        secrets=plain_keys(settings),
        environment=settings.env,
    )
    return Function(
        settings,
        output_prefix=os.environ.get("ASR_OUTPUT_PREFIX", "transcripts/"),
    )


_function: Function | None = None


def handler(event: MutableMapping[str, Any], context: object = None) -> dict[str, Any]:
    """What Lambda calls."""
    global _function
    if _function is None:
        _function = open_function()
    return _function(event, context)
