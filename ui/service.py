"""What the page knows about the service right now: its state, what it offers, or why it offers nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ui.client import AsrClient
from ui.errors import ApiError
from ui.transcript import Language, Model


@dataclass(frozen=True)
class Service:
    """One look at the service. ``problem`` is set when it cannot be used; ``state`` is its own word."""

    state: str
    models: tuple[Model, ...] = ()
    languages: tuple[Language, ...] = ()
    information: Mapping[str, Any] = field(default_factory=dict)
    problem: ApiError | None = None

    @property
    def usable(self) -> bool:
        """Whether files can be sent."""
        return self.state == "ready"

    @property
    def max_upload_bytes(self) -> int | None:
        """The largest file it takes, when it says so."""
        limits = self.information.get("limits")
        value = limits.get("max_upload_bytes") if isinstance(limits, Mapping) else None
        return value if isinstance(value, int) and value > 0 else None

    def model(self, name: str | None) -> Model | None:
        """The model of that name, or the default one for None."""
        return next((model for model in self.models if name in (model.name, None)), None)


async def look(client: AsrClient) -> Service:
    """Ask for everything at once; a failure becomes the service's state."""
    try:
        health = await client.health()
        if not health.ready:
            return Service(health.state)
        models, languages, information = await asyncio.gather(
            client.models(), client.languages(), client.information()
        )
        return Service(health.state, models, languages, information)
    except ApiError as error:
        return Service("down", problem=error)
