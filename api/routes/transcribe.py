"""``POST /transcribe`` and ``POST /transcribe/batch``: the project's own API."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic_core import to_json

from api.errors import AsrError, ClientDisconnected, InvalidRequestError, RetryLaterError, public
from api.forms import TranscribeForm, form_schema, parse_form
from api.multipart import FILE_FIELDS, Upload
from api.routes.intake import Intake, PlainRoute, only_file, request_id, unless_disconnected
from api.routes.sse import stream_response
from api.schemas import ERRORS, TRANSCRIPTS, BatchBody, TranscriptionBody, transcription_body
from api.service import Service, service_of
from api.subtitles import to_srt, to_vtt
from api.telemetry import current_record, outcome_of
from api.transcriber import Options, Transcriber
from api.transcript import Segment, Transcript

_log = structlog.get_logger("api.routes.transcribe")

# How a file of a batch may end through our fault, the worst first: the whole request counts as that.
_OUR_FAULTS = ("error", "timeout", "rejected")

router = APIRouter(tags=["transcribe"], route_class=PlainRoute, responses=ERRORS)


@router.post(
    "/transcribe",
    summary="Transcribe one file",
    response_model=TranscriptionBody,
    responses=TRANSCRIPTS,
    openapi_extra=dict(form_schema(TranscribeForm)),
)
async def transcribe(request: Request) -> Response:
    """Audio in any common format, judged by its bytes; the answer's form is chosen by ``format``."""
    service = service_of(request)
    intake = Intake(request, service)
    async with intake as form:
        fields = parse_form(TranscribeForm, form.fields, request.query_params)
        transcriber = service.transcriber(fields.model)
        options = fields.options(service.settings)
        upload = only_file(form)
        if fields.stream:
            more = StreamDetails(timestamps=fields.timestamps)
            return await stream_response(request, service, intake, transcriber, upload, options, more=more)
        transcript = await unless_disconnected(request, transcriber.transcribe(upload.file, options))
    with service.telemetry.stage("render"):
        return render(transcript, fields)


def render(transcript: Transcript, fields: TranscribeForm) -> Response:
    """The answer in the form asked for."""
    if fields.format == "text":
        return PlainTextResponse(transcript.text + "\n")
    if fields.format == "srt":
        return Response(to_srt(transcript), media_type="application/x-subrip; charset=utf-8")
    if fields.format == "vtt":
        return Response(to_vtt(transcript), media_type="text/vtt; charset=utf-8")
    return _json(_body(transcript, timestamps=fields.timestamps))


def _body(transcript: Transcript, *, timestamps: bool) -> dict[str, Any]:
    return transcription_body(transcript, request_id=request_id(), timestamp=_now(), timestamps=timestamps)


def _json(body: dict[str, Any]) -> Response:
    return Response(to_json(body), media_type="application/json")


@dataclass(frozen=True)
class StreamDetails:
    """Our own fields in the stream's events: a delta's times, and the whole answer at the end."""

    timestamps: bool

    def of_segment(self, segment: Segment) -> dict[str, Any]:
        """Where the text stands in the file, in seconds."""
        return {"start": round(segment.start_s, 3), "end": round(segment.end_s, 3)} if self.timestamps else {}

    def of_transcript(self, transcript: Transcript) -> dict[str, Any]:
        """The body of the plain answer, and ``timings``: seconds per stage, too late for a header."""
        record = current_record()
        timings = {stage: round(s, 6) for stage, s in record.stages_s.items()} if record is not None else {}
        return {**_body(transcript, timestamps=self.timestamps), "timings": timings}


@router.post(
    "/transcribe/batch",
    summary="Transcribe many files",
    response_model=BatchBody,
    openapi_extra=dict(form_schema(TranscribeForm, files="files", many=True)),
)
async def transcribe_batch(request: Request) -> Response:
    """Many files in one request, one entry per file in order; a file that fails has its error in its place.

    The files are parts named ``files`` (or ``file``, or ``files[]``), the other fields hold for all of them.
    Only JSON is given here.
    """
    service = service_of(request)
    async with Intake(request, service, many=True) as form:
        fields = parse_form(TranscribeForm, form.fields, request.query_params)
        if fields.stream or fields.format not in ("json", "verbose_json"):
            param, value = ("stream", "true") if fields.stream else ("format", fields.format)
            raise InvalidRequestError(f"{param}: {value} cannot be had, a batch is JSON only.", param=param)
        transcriber = service.transcriber(fields.model)
        options = fields.options(service.settings)
        transcriber.language_of(options.language)  # at fault for all of them
        if not form.files:
            raise InvalidRequestError("The form has no file part.", param="files")
        for upload in form.files:
            if upload.field not in FILE_FIELDS:
                raise InvalidRequestError(
                    f"A file came in part {upload.field!r}; send files in parts named 'files'.", param="files"
                )
        work = _all(service, transcriber, form.files, options, timestamps=fields.timestamps)
        results = await unless_disconnected(request, work)
    with service.telemetry.stage("render"):
        failed = sum("error" in item for item in results)
        succeeded = len(results) - failed
        return _json({"id": request_id(), "results": results, "succeeded": succeeded, "failed": failed})


async def _all(
    service: Service, transcriber: Transcriber, uploads: list[Upload], options: Options, *, timestamps: bool
) -> list[dict[str, Any]]:
    """What BatchItem says of each file; those not done at the request's deadline have that error.

    A few files at a time, so that one batch does not crowd out the other callers. The batch was let in, so
    each waits for room in the queue: one that was refused would be missing among those that are done.
    """
    deadline_s = transcriber.deadline_s()
    slots = asyncio.Semaphore(service.settings.max_segments_in_flight)
    failures: list[AsrError] = []
    refusals: list[RetryLaterError] = []

    async def one(index: int, upload: Upload) -> dict[str, Any]:
        item = {"index": index, "filename": upload.filename}
        async with slots:
            try:
                transcript = await transcriber.transcribe(
                    upload.file, options, wait=True, deadline_s=deadline_s
                )
            except ClientDisconnected:
                raise
            except Exception as error:
                if not isinstance(error, AsrError):
                    _log.error("file_failed", index=index, exc_info=error)
                elif isinstance(error, RetryLaterError):
                    refusals.append(error)
                failures.append(public(error, request_id()))
                return {**item, **failures[-1].to_body()}
        return {**item, "transcription": _body(transcript, timestamps=timestamps)}

    results = await asyncio.gather(*(one(index, upload) for index, upload in enumerate(uploads)))
    if len(refusals) == len(uploads):  # nothing was done: let the caller's own retry handle it
        raise refusals[-1]
    _count_failures(service, failures)
    return list(results)


def _count_failures(service: Service, failures: list[AsrError]) -> None:
    """Count what failed in a batch that is answered 200 all the same.

    Callers who send batches see a broken or hung engine as files that fail: were their requests ``ok``, no
    objective and no alert would know of it. So the request ends as the worst of its files that failed through
    the service's fault; files that failed through the caller's leave it ``ok``.
    """
    record = current_record()
    worst = min(
        (error for error in failures if _outcome(error) in _OUR_FAULTS),
        key=lambda error: _OUR_FAULTS.index(_outcome(error)),
        default=None,
    )
    if record is not None and worst is not None:
        record.failed(worst.code, worst.status)
        failures = [error for error in failures if error is not worst]  # it is counted with the request
    for error in failures:
        service.telemetry.metrics.reject(error.code)


def _outcome(error: AsrError) -> str:
    return outcome_of(error.status, error.code)


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
