"""``POST /v1/audio/transcriptions``: OpenAI's contract, every field and every response format."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from api.forms import OpenAIForm, form_schema, parse_form
from api.openai_format import json_body, verbose_body
from api.routes.intake import Intake, PlainRoute, only_file, unless_disconnected
from api.routes.sse import stream_response
from api.schemas import ERRORS, TRANSCRIPTS
from api.service import service_of
from api.subtitles import to_srt, to_vtt
from api.transcript import Transcript

router = APIRouter(tags=["openai"], route_class=PlainRoute, responses=ERRORS)


@router.post(
    "/v1/audio/transcriptions",
    summary="Transcribe one file, OpenAI's form",
    responses=TRANSCRIPTS,
    openapi_extra=dict(form_schema(OpenAIForm)),
)
async def transcriptions(request: Request) -> Response:
    """What the official ``openai`` client calls. ``prompt`` and ``temperature`` have no effect on CTC."""
    service = service_of(request)
    intake = Intake(request, service)
    async with intake as form:
        fields = parse_form(OpenAIForm, form.fields, request.query_params)
        transcriber = service.transcriber(fields.model)
        options = fields.options(service.settings)
        upload = only_file(form)
        logprobs = "logprobs" in fields.include
        if fields.stream:
            return await stream_response(
                request, service, intake, transcriber, upload, options, logprobs=logprobs
            )
        transcript = await unless_disconnected(request, transcriber.transcribe(upload.file, options))
    with service.telemetry.stage("render"):
        return render(transcript, fields, logprobs=logprobs)


def render(transcript: Transcript, fields: OpenAIForm, *, logprobs: bool) -> Response:
    """The answer in the form asked for; text, srt and vtt are raw bodies, never JSON strings."""
    match fields.response_format:
        case "text":
            return PlainTextResponse(transcript.text + "\n")
        case "srt":
            return Response(to_srt(transcript), media_type="application/x-subrip; charset=utf-8")
        case "vtt":
            return Response(to_vtt(transcript), media_type="text/vtt; charset=utf-8")
        case "verbose_json":
            return JSONResponse(verbose_body(transcript, fields.timestamp_granularities, logprobs=logprobs))
        case _:
            return JSONResponse(json_body(transcript, logprobs=logprobs))
