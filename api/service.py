"""The running service as the routes see it: its phase, its models, who is admitted.

    starting ──models warm──> ready ──SIGTERM──> draining ──grace over──> closing
        └──a model is refused──> failed

While draining, readiness fails but new work is still taken, because load balancers notice late; while closing
it is refused and what was accepted is finished.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from starlette.requests import HTTPConnection

from api.batcher import Admission
from api.errors import DrainingError, ModelNotFoundError, NotReadyError, StreamsFullError
from api.registry import LoadedModel, Registry
from api.settings import Settings
from api.telemetry import Telemetry
from api.transcriber import Transcriber

Phase = Literal["starting", "ready", "draining", "closing", "failed"]

WHISPER_ALIAS = "whisper-1"


class Service:
    """Everything a route needs, in one place; made by create_app()."""

    def __init__(self, settings: Settings, telemetry: Telemetry, decode_threads: int) -> None:
        self.settings = settings
        self.telemetry = telemetry
        self.phase: Phase = "starting"
        self.failure: str | None = None
        self.created_s = int(time.time())
        self.pool = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._registry: Registry | None = None
        self._transcribers: dict[str, Transcriber] = {}
        self._in_progress = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.closing = asyncio.Event()
        """Set when live sessions have to come to their end."""
        self._streams: set[Hashable] = set()

    # -- phases

    @property
    def is_ready(self) -> bool:
        """Whether new work is welcome."""
        return self.phase == "ready"

    @property
    def is_draining(self) -> bool:
        """Whether the process is on its way out."""
        return self.phase in ("draining", "closing")

    @property
    def has_started(self) -> bool:
        """Whether the models were loaded and warm at some time."""
        return self._registry is not None

    def opened(self, registry: Registry) -> None:
        """Models are loaded and warm."""
        self._registry = registry
        self._transcribers = {
            model.name: Transcriber(model, self.settings, self.telemetry, self.pool)
            for model in registry.models()
        }
        if self.phase == "starting":
            self.phase = "ready"

    def stalled(self) -> str | None:
        """Why the process should be restarted, or None: a worker has made no progress on its batch."""
        if self.phase == "failed":
            return "failed"
        return self._registry.stalled() if self._registry is not None else None

    def drain(self) -> None:
        """Readiness fails from here on; new work is still taken until ``close``."""
        if self.phase in ("starting", "ready"):
            self.phase = "draining"

    def refuse_new(self) -> None:
        """New work is refused from here on; what was accepted goes on."""
        self.phase = "closing"
        self.closing.set()

    async def close(self) -> None:
        """Refuse new work, finish what was accepted, stop the workers."""
        self.refuse_new()
        await self.wait_idle(self.settings.drain_timeout_s)
        if self._registry is not None:
            await self._registry.close(self.settings.drain_timeout_s)
        self.pool.shutdown(wait=True, cancel_futures=True)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait for the accepted requests; False when some are left."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    # -- live sessions

    def enter_stream(self, owner: Hashable) -> None:
        """Take a place, to be given back. Raises NotReadyError, DrainingError or StreamsFullError."""
        self._admission()
        if len(self._streams) >= self.settings.max_streams:
            raise StreamsFullError(f"{self.settings.max_streams} live sessions are open, as many as may be.")
        self._streams.add(owner)

    def leave_stream(self, owner: Hashable) -> None:
        """Give the place back."""
        self._streams.discard(owner)

    @property
    def has_streams(self) -> bool:
        """Whether a live session is open."""
        return bool(self._streams)

    # -- requests

    def check_room(self) -> None:
        """Raise what ``admit`` would, without taking a place."""
        self._admission().check_room()

    def admit(self, owner: Hashable) -> None:
        """Take a place. Raises NotReadyError, DrainingError or QueueFullError; otherwise call ``leave``."""
        self._admission().enter(owner)
        self._in_progress += 1
        self._idle.clear()

    def _admission(self) -> Admission:
        if self.phase == "closing":
            raise DrainingError("The service is shutting down.")
        if self._registry is None:
            raise NotReadyError(
                "The service could not start." if self.phase == "failed" else "The models are still loading."
            )
        return self._registry.admission

    @property
    def in_progress(self) -> int:
        """Requests that hold a place."""
        return self._in_progress

    def leave(self, owner: Hashable) -> None:
        """Give the place back."""
        if self._registry is not None:
            self._registry.admission.leave(owner)
        self._in_progress -= 1
        if self._in_progress == 0:
            self._idle.set()

    def transcriber(self, name: str) -> Transcriber:
        """By model name; empty and ``whisper-1`` are the default model. Raises ModelNotFoundError."""
        if name in ("", WHISPER_ALIAS):
            name = self.settings.default_model_name
        found = self._transcribers.get(name)
        if found is None:
            raise ModelNotFoundError(name[:100], list(self._transcribers))
        return found

    def models(self) -> list[LoadedModel]:
        """Loaded models. Raises NotReadyError while starting."""
        if self._registry is None:
            raise NotReadyError("The models are still loading.")
        return list(self._registry.models())

    def summary(self) -> dict[str, Any]:
        """What ``GET /health`` shows."""
        body: dict[str, Any] = {
            "status": self.phase,
            "models": list(self._transcribers),
            "requests_in_progress": self._in_progress,
            "live_sessions": len(self._streams),
        }
        if self._registry is not None:
            body["queue"] = self._registry.queue_summary()
        return body


def service_of(request: HTTPConnection) -> Service:
    """The service of the application that got the request."""
    service = request.app.state.service
    if not isinstance(service, Service):
        raise TypeError("create_app() made no service")
    return service
