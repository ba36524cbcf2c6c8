"""``WS /v1/realtime`` and ``WS /vosk``: speech as it is spoken."""

from __future__ import annotations

from fastapi import APIRouter, WebSocket

from api.errors import NotFoundError
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


@router.websocket("/{path:path}")
async def unknown(websocket: WebSocket) -> None:
    """Any other address; left to the router it would be refused as if a key were wrong (403), in no form."""
    raise NotFoundError("There is no such live session; /v1/realtime and /vosk are offered.")
