"""S3 events: each recording that arrives gets its transcript beside it, as JSON.

Source of the event's form: AWS, "Event message structure" of S3 notifications; keys come URL-encoded.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import MutableMapping
from typing import Any, Protocol
from urllib.parse import unquote_plus

import structlog

from api.errors import AsrError
from api.openai_format import verbose_body
from api.transcriber import Options, Transcriber

_log = structlog.get_logger("serverless.storage")

SPOOL_BYTES = 8 * 2**20


class ObjectStore(Protocol):
    """The part of boto3's S3 client that is used."""

    def download_fileobj(self, bucket: str, key: str, sink: Any) -> None:
        """Write an object into `sink`."""
        ...

    def put_object(self, **named: Any) -> Any:
        """Store an object."""
        ...


def is_s3(event: MutableMapping[str, Any]) -> bool:
    """Whether an event is S3's, its test event included."""
    records = event.get("Records") or []
    if event.get("Service") == "Amazon S3":
        return True
    return bool(records) and all(record.get("eventSource") == "aws:s3" for record in records)


def open_store() -> ObjectStore:
    """boto3's client, which finds region, role and endpoint in the environment."""
    import boto3
    from botocore.config import Config

    settings = Config(
        retries={"max_attempts": 5, "mode": "standard"},
        connect_timeout=5,
        read_timeout=60,
        request_checksum_calculation="when_required",
    )
    store: ObjectStore = boto3.client("s3", config=settings)
    return store


async def transcribe_records(
    event: MutableMapping[str, Any],
    transcriber: Transcriber,
    store: ObjectStore,
    *,
    prefix: str,
    max_bytes: int,
) -> dict[str, Any]:
    """Transcribe every created object of an event into `prefix` + key + `.json`, in the same bucket.

    A recording that is at fault (no audio, too long, too large) gets its error written in the transcript's
    place, because trying again would not help. Anything else is raised once the other recordings are done, so
    that Lambda tries again: one error as it is, several as an ExceptionGroup.
    """
    done: list[dict[str, Any]] = []
    errors: list[Exception] = []
    for record in event.get("Records") or []:
        try:
            done.append(await _transcribe_record(record, transcriber, store, prefix, max_bytes))
        except Exception as error:
            errors.append(error)
            key = record.get("s3", {}).get("object", {}).get("key")
            _log.error("object_failed", key=key, error=f"{type(error).__name__}: {error}")
    if len(errors) > 1:
        raise ExceptionGroup(f"{len(errors)} of {len(errors) + len(done)} recordings failed", errors)
    if errors:
        raise errors[0]
    return {"objects": done}


async def _transcribe_record(
    record: dict[str, Any], transcriber: Transcriber, store: ObjectStore, prefix: str, max_bytes: int
) -> dict[str, Any]:
    bucket = record["s3"]["bucket"]["name"]
    key = unquote_plus(record["s3"]["object"]["key"])
    # the console makes a folder as an empty object whose key ends in a slash
    is_recording = record.get("eventName", "").startswith("ObjectCreated") and not key.endswith("/")
    if not is_recording or key.startswith(prefix):
        return {"key": key, "status": "skipped"}
    size_bytes = int(record["s3"]["object"].get("size", 0))
    body, status = await _one(transcriber, store, bucket, key, size_bytes, max_bytes)
    target = f"{prefix}{key}.json"
    content = json.dumps(body, ensure_ascii=False).encode("utf-8")
    store.put_object(Bucket=bucket, Key=target, Body=content, ContentType="application/json")
    _log.info("object_transcribed", bucket=bucket, key=key, status=status, bytes=size_bytes)
    return {"key": key, "status": status, "transcript": target}


async def _one(
    transcriber: Transcriber, store: ObjectStore, bucket: str, key: str, size_bytes: int, max_bytes: int
) -> tuple[dict[str, Any], str]:
    if size_bytes > max_bytes:
        error = {
            "message": f"the object has {size_bytes} bytes, the limit is {max_bytes}",
            "code": "too_large",
        }
        return {"error": error}, "failed"
    with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as file:
        store.download_fileobj(bucket, key, file)
        file.seek(0)
        try:
            transcript = await transcriber.transcribe(file, Options(), wait=True)  # type: ignore[arg-type]
        except AsrError as error:
            if error.status >= 500 or error.status == 429:
                raise
            return error.to_body(), "failed"
    return verbose_body(transcript, ("word", "segment"), logprobs=False), "transcribed"
