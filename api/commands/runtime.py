"""The models without HTTP: for commands that transcribe or measure in this process."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from api.cgroup import usable_cores
from api.registry import open_registry
from api.service import Service
from api.settings import Settings
from api.telemetry import Telemetry


def warnings_only() -> None:
    """Keep the log of a command to what a person must know."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


@asynccontextmanager
async def open_service(settings: Settings) -> AsyncIterator[Service]:
    """A ready service of this process; closed at the end. Raises BundleError, SettingsError."""
    cores = usable_cores()
    service = Service(settings, Telemetry(), settings.decode_threads or min(4, cores))
    try:
        service.opened(await open_registry(settings, service.telemetry))
        yield service
    finally:
        await service.close()
