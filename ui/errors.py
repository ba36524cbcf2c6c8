"""What can go wrong between the page and the service.

ApiError
├── ApiUnreachableError     no connection could be made
├── ApiTimeoutError         connected, then nothing for too long
├── ApiProtocolError        an answer that is not what the contract promises
├── PageFaultError          a fault of the page itself
└── ApiStatusError          an answer with an error status, read from the OpenAI envelope
    ├── BadRequestError         400
    │   └── UndecodableAudioError   400, code undecodable_audio and what else is wrong with the file itself
    ├── AccessError             401, 403
    ├── UnknownModelError       404
    ├── UploadTooLargeError     413
    ├── InvalidValueError       422
    │   └── AudioTooLongError       422, code audio_too_long
    ├── BusyError               429, and 503 where something is used up
    ├── NotReadyError           503
    ├── DeadlineError           504, 408
    └── ServerFaultError        every other status
"""

from __future__ import annotations


class ApiError(Exception):
    """Base of all; ``message`` may be shown to a person as it is."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ApiUnreachableError(ApiError):
    """Nobody listens at the address, or its name cannot be resolved."""


class ApiTimeoutError(ApiError):
    """The service took the connection and then stayed silent."""


class ApiProtocolError(ApiError):
    """The answer is not JSON, or a field is missing or of the wrong type."""


class PageFaultError(ApiError):
    """Nothing is known to be wrong with the service: the page met something it was not written for."""


class ApiStatusError(ApiError):
    """The service said no. ``retry_after_s`` is how long it asks to wait, when it says so."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        type_: str = "",
        code: str = "",
        param: str | None = None,
        request_id: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type_
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class BadRequestError(ApiStatusError):
    """The form is wrong."""


class UndecodableAudioError(BadRequestError):
    """The bytes are not audio that can be read."""


class AccessError(ApiStatusError):
    """No key, a wrong key, or a key without the right."""


class UnknownModelError(ApiStatusError):
    """The service does not serve a model of that name."""


class UploadTooLargeError(ApiStatusError):
    """More bytes than the service takes."""


class InvalidValueError(ApiStatusError):
    """A field's value is out of range."""


class AudioTooLongError(InvalidValueError):
    """More seconds of audio than the service takes."""


class BusyError(ApiStatusError):
    """The queue, this key's rate, or a resource of the machine is used up."""


class NotReadyError(ApiStatusError):
    """Starting, or shutting down."""


class DeadlineError(ApiStatusError):
    """The answer would have come too late."""


class ServerFaultError(ApiStatusError):
    """A fault on the service's side."""


_BY_CODE: dict[str, tuple[int, type[ApiStatusError]]] = {
    "invalid_request": (400, BadRequestError),
    "undecodable_audio": (400, UndecodableAudioError),
    "empty_file": (400, UndecodableAudioError),
    "no_audio_stream": (400, UndecodableAudioError),
    "no_audio_samples": (400, UndecodableAudioError),
    "not_finite_samples": (400, UndecodableAudioError),
    "invalid_api_key": (401, AccessError),
    "permission_denied": (403, AccessError),
    "model_not_found": (404, UnknownModelError),
    "upload_too_large": (413, UploadTooLargeError),
    "invalid_value": (422, InvalidValueError),
    "audio_too_long": (422, AudioTooLongError),
    "queue_full": (429, BusyError),
    "rate_limit_exceeded": (429, BusyError),
    "not_ready": (503, NotReadyError),
    "draining": (503, NotReadyError),
    "out_of_resources": (503, BusyError),
    "too_many_connections": (503, BusyError),
    "deadline_exceeded": (504, DeadlineError),
}
_BY_STATUS: dict[int, type[ApiStatusError]] = {
    400: BadRequestError,
    401: AccessError,
    403: AccessError,
    404: UnknownModelError,
    408: DeadlineError,
    413: UploadTooLargeError,
    422: InvalidValueError,
    429: BusyError,
    503: NotReadyError,
    504: DeadlineError,
}


def status_error(
    status: int, body: object, *, request_id: str = "", retry_after_s: float | None = None
) -> ApiStatusError:
    """The typed error for a status and its decoded body (the envelope, or anything else a proxy may send).

    ``status`` 0 means that the error came inside an answer that had begun well (a stream, a batch): its code
    then tells the status.
    """
    envelope = body.get("error") if isinstance(body, dict) else None
    fields = envelope if isinstance(envelope, dict) else {}
    code = str(fields.get("code") or "")
    param = fields.get("param")
    known_status, kind = _BY_CODE.get(code, (500, _BY_STATUS.get(status, ServerFaultError)))
    status = status or known_status
    return kind(
        str(fields.get("message") or f"The service answered with status {status}."),
        status=status,
        type_=str(fields.get("type") or ""),
        code=code,
        param=str(param) if param else None,
        request_id=request_id,
        retry_after_s=retry_after_s,
    )
