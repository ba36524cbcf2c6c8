"""A multipart body as it arrives -> fields and spooled files, with every limit enforced while reading.

The file is the last part on the wire and may come without a Content-Length; nothing is held in memory but
fields (bounded), a megabyte per file, and one chunk. A limit that is passed ends the reading there.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import unquote_to_bytes

import structlog
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from api.errors import (
    ClientDisconnected,
    InvalidRequestError,
    OutOfResourcesError,
    UploadTimeoutError,
    UploadTooLargeError,
)

FILE_FIELDS = frozenset({"file", "files", "files[]"})
"""Names under which files may come."""

_EXTENDED_FILENAME = re.compile(rb""";\s*filename\*\s*=\s*"?[\w-]*'[^']*'([^;"\s]*)""", re.IGNORECASE)
"""RFC 8187's ``filename*=UTF-8''...``: how urllib3 before 1.25 and others send names that are not ASCII."""
_NOT_OFFERED = {
    "languages": "one language is taken, in the field 'language'",
    "known_speaker_names": "speakers are not told apart",
    "known_speaker_references": "speakers are not told apart",
}

_log = structlog.get_logger("api.multipart")

_SPOOL_MEMORY_BYTES = 1 << 20
_MAX_FIELD_BYTES = 1 << 16
_MAX_FIELDS_BYTES = 1 << 20
_MAX_PARTS = 4096
_MAX_PART_HEADER_BYTES = 8192
_MAX_PREAMBLE_BYTES = 1 << 16
_EXTRA_BODY_BYTES = 1 << 20  # boundaries, part headers and fields beside the files


@dataclass(frozen=True, slots=True)
class Limits:
    """What one body may hold."""

    file_bytes: int
    files: int
    body_bytes: int
    idle_s: float
    total_s: float
    spool_dir: Path

    def too_large(self) -> UploadTooLargeError:
        """What a body above ``body_bytes`` is answered with."""
        several = self.body_bytes > self.file_bytes
        return UploadTooLargeError(self.body_bytes, param="files" if several else "file", together=several)


@dataclass(slots=True)
class Upload:
    """One uploaded file; ``file`` stands at its start. ``filename`` is shown, never used as a path."""

    field: str
    filename: str
    file: BinaryIO
    size_bytes: int = 0


@dataclass(slots=True)
class Form:
    """Fields in the order they came (names may repeat) and files. Closing removes the spooled files."""

    fields: list[tuple[str, str]] = field(default_factory=list)
    files: list[Upload] = field(default_factory=list)

    def close(self) -> None:
        """Drop the spooled files."""
        for upload in self.files:
            # On a full disk closing tries once more to write what is left.
            with contextlib.suppress(OSError):
                upload.file.close()


async def read_form(request: Request, limits: Limits) -> Form:
    """Read the whole body.

    Raises InvalidRequestError, UploadTooLargeError, UploadTimeoutError, OutOfResourcesError,
    ClientDisconnected. On any of them the files are already gone.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequestError(
            "Send the request as multipart/form-data with a part named file.", param="file"
        )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limits.body_bytes + _EXTRA_BODY_BYTES:
        raise limits.too_large()
    form = Form()
    try:
        await _Reader(form, limits, boundary).read(request)
    except BaseException as error:
        form.close()
        if isinstance(error, FormParserError):
            raise InvalidRequestError(f"The multipart body is malformed: {error}") from error
        if isinstance(error, OSError):
            _log.error("upload_not_stored", folder=str(limits.spool_dir), problem=str(error))
            raise OutOfResourcesError("There is no room to store the upload; try again later.") from error
        raise
    return form


def refuse_not_offered(field: str) -> None:
    """Raise InvalidRequestError where OpenAI has a field of this name and this service does not.

    `field` may be a path with points, of a live session's field.
    """
    name = field.removesuffix("[]").rpartition(".")[2]
    if name in _NOT_OFFERED:
        raise InvalidRequestError(f"Field {field!r} is not offered: {_NOT_OFFERED[name]}.", param=field)


def refuse_file_without_name(field: str) -> None:
    """Raise InvalidRequestError where a part without a filename has the name of a file's."""
    if field in FILE_FIELDS:
        raise InvalidRequestError(f"Field {field!r} must be a file part (with a filename).", param=field)


class _Reader:
    """Callbacks of the parser collect; what goes to disk is written in a thread."""

    def __init__(self, form: Form, limits: Limits, boundary: bytes) -> None:
        self._form = form
        self._limits = limits
        self._received_bytes = 0
        self._field_bytes = 0
        self._parts = 0
        self._ended = False
        self._header_name = b""
        self._header_value = b""
        self._header_bytes = 0
        self._disposition = b""
        self._field_name = ""
        self._value = bytearray()
        self._upload: Upload | None = None
        self._to_write: list[tuple[Upload, bytes]] = []
        self._delimiter = b"--" + boundary
        self._preamble: bytes | None = b"\n"  # its last bytes, until the first delimiter; a line begins here
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value_data,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    async def read(self, request: Request) -> None:
        """All of the body; a client that stalls or drips is told so and let go."""
        limits, now_s = self._limits, asyncio.get_running_loop().time
        deadline_s, more = now_s() + limits.total_s, True
        try:
            async with asyncio.timeout(None) as waiting:
                while more:
                    waiting.reschedule(min(now_s() + limits.idle_s, deadline_s))
                    message = await request.receive()
                    waiting.reschedule(None)
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnected
                    more = message.get("more_body", False)
                    await self._take(message.get("body", b""))
        except TimeoutError:
            raise UploadTimeoutError("The upload stopped before it was complete.") from None
        self._parser.finalize()
        if self._preamble is not None and not self._preamble.endswith(self._delimiter):
            raise InvalidRequestError("The multipart body is malformed: its boundary never comes.")
        if not self._ended:
            raise InvalidRequestError("The multipart body ends before its closing boundary.")
        for upload in self._form.files:
            upload.file.seek(0)

    async def _take(self, chunk: bytes) -> None:
        self._received_bytes += len(chunk)
        if self._received_bytes > self._limits.body_bytes + _EXTRA_BODY_BYTES:
            raise self._limits.too_large()
        if self._preamble is not None:
            chunk = self._after_preamble(self._preamble + chunk)
        self._parser.write(chunk)
        await self._flush()

    def _after_preamble(self, data: bytes) -> bytes:
        """From the first delimiter on, without the blanks that may follow it on its line.

        What comes before it is to be ignored (RFC 2046, section 5.1.1). Blanks behind later delimiters the
        parser takes itself.
        """
        at = data.find(self._delimiter)
        if at < 0 and self._received_bytes > _MAX_PREAMBLE_BYTES:
            raise InvalidRequestError(
                f"The multipart body is malformed: no boundary in its first {_MAX_PREAMBLE_BYTES} bytes."
            )
        if at < 0:
            self._preamble = data[-len(self._delimiter) :]
            return b""
        if data[at - 1 : at] != b"\n":  # rather refused than a part taken for preamble
            raise InvalidRequestError("The multipart body is malformed: its boundary begins within a line.")
        line_end = data[at + len(self._delimiter) :].lstrip(b" \t")
        self._preamble = None if line_end else b"\n" + self._delimiter
        return self._delimiter + line_end if line_end else b""

    async def _flush(self) -> None:
        pending, self._to_write = self._to_write, []
        for upload, data in pending:
            spool = cast("tempfile.SpooledTemporaryFile[bytes]", upload.file)
            on_disk = upload.size_bytes > _SPOOL_MEMORY_BYTES
            if on_disk:
                await asyncio.to_thread(spool.write, data)
            else:
                spool.write(data)

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise InvalidRequestError(f"The form has more than {_MAX_PARTS} parts.")
        self._header_name = self._header_value = self._disposition = b""
        self._header_bytes = 0
        self._upload = None
        self._field_name = ""
        self._value = bytearray()

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > _MAX_PART_HEADER_BYTES:
            raise InvalidRequestError(f"A part's headers are longer than {_MAX_PART_HEADER_BYTES} bytes.")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_name += data[start:end]

    def _header_value_data(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidRequestError("A part of the form has no name.")
        if b"filename" not in options and (extended := _EXTENDED_FILENAME.search(self._disposition)):
            options[b"filename"] = unquote_to_bytes(extended[1])
        name = options[b"name"].decode("utf-8", "replace")
        if b"filename" not in options:
            self._field_name = name
            return
        if len(self._form.files) >= self._limits.files:
            raise InvalidRequestError(f"At most {self._limits.files} file(s) may be sent here.", param=name)
        spool = tempfile.SpooledTemporaryFile(  # noqa: SIM115  lives as long as the form
            max_size=_SPOOL_MEMORY_BYTES, dir=str(self._limits.spool_dir)
        )
        filename = options[b"filename"].decode("utf-8", "replace")[:255]
        self._upload = Upload(name[:64], filename, cast(BinaryIO, spool))
        self._form.files.append(self._upload)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        upload = self._upload
        if upload is not None:
            upload.size_bytes += end - start
            if upload.size_bytes > self._limits.file_bytes:
                raise UploadTooLargeError(self._limits.file_bytes, param=upload.field)
            self._to_write.append((upload, data[start:end]))
            return
        self._field_bytes += end - start
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            refuse_file_without_name(self._field_name)
            refuse_not_offered(self._field_name)
            raise InvalidRequestError(
                f"A field is longer than {_MAX_FIELD_BYTES} bytes.", param=self._field_name[:64]
            )
        if self._field_bytes > _MAX_FIELDS_BYTES:
            raise InvalidRequestError(f"The fields together are longer than {_MAX_FIELDS_BYTES} bytes.")

    def _part_end(self) -> None:
        if self._upload is None:
            self._form.fields.append((self._field_name, self._value.decode("utf-8", "replace")))

    def _end(self) -> None:
        self._ended = True
