"""``WS /v1/realtime`` and ``WS /vosk``: speech as it is spoken."""

from __future__ import annotations

from fastapi import APIRouter, WebSocket

from api.live.connection import Connection
from api.live.realtime import Realtime
from api.live.vosk import Vosk
from api.service import service_of

router = APIRouter()


@router.websocket("/v1/realtime")
async def realtime(websocket: WebSocket, model: str = "", intent: str = "transcription") -> None:
    """OpenAI's realtime transcription sessions. `model` may also come with ``session.update``."""
    service = service_of(websocket)
    Realtime.check(service, model, intent)
    async with Connection(websocket, service, "realtime", Realtime.error_event, ("realtime",)) as connection:
        await Realtime(connection, service, model).run()


@router.websocket("/vosk")
async def vosk(websocket: WebSocket) -> None:
    """The protocol of Vosk's server."""
    service = service_of(websocket)
    async with Connection(websocket, service, "vosk", Vosk.error_message, ("vosk",)) as connection:
        await Vosk(connection, service).run()
