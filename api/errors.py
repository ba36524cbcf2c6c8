"""Every failure a caller can meet, and the one place where it becomes an HTTP answer.

    AsrError                         status  code
    ├── ClientError
    │   ├── InvalidRequestError      400     invalid_request         the form itself is wrong
    │   ├── UndecodableAudioError    400     undecodable_audio       the bytes are not audio
    │   ├── AuthenticationError      401     invalid_api_key         no key, or a wrong one
    │   ├── PermissionDeniedError    403     permission_denied       the key may not do this
    │   ├── NotFoundError            404     not_found               no such route or object
    │   │   └── ModelNotFoundError   404     model_not_found         no model of that name is loaded
    │   ├── MethodNotAllowedError    405     method_not_allowed
    │   ├── UploadTimeoutError       408     upload_timeout          the body stopped arriving
    │   ├── StreamTimeoutError       408     stream_timeout          a live session is silent, or too long
    │   ├── UploadTooLargeError      413     upload_too_large        ASR_MAX_UPLOAD_BYTES, ASR_MAX_BODY_BYTES
    │   ├── InvalidValueError        422     invalid_value           well formed, but out of range
    │   └── AudioTooLongError        422     audio_too_long          more seconds or samples than allowed
    ├── RetryLaterError              (always carries Retry-After)
    │   ├── QueueFullError           429     queue_full              the queue's audio-seconds are used up
    │   ├── RateLimitedError         429     rate_limit_exceeded     this key sends too much
    │   ├── StreamsFullError         429     too_many_streams        ASR_MAX_STREAMS live sessions are open
    │   ├── NotReadyError            503     not_ready               models are still loading
    │   ├── DrainingError            503     draining                shutting down
    │   └── OutOfResourcesError      503     out_of_resources        disk or memory is full
    ├── DeadlineExceededError        504     deadline_exceeded       the answer would come too late
    ├── InferenceError               500     inference_failed        the engine failed on this batch
    ├── InternalError                500     internal_error          anything else
    └── ClientDisconnected           499     client_disconnected     internal: nobody is left to answer

    BundleError                      not HTTP: a model folder is refused when it is loaded
    SettingsError                    not HTTP: an unsafe or impossible setting refuses to start

The body is OpenAI's envelope on every route: ``{"error": {"message", "type", "param", "code"}}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, ClassVar

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse


class AsrError(Exception):
    """A failure with its own HTTP status.

    ``message`` reaches the caller word for word, so it never carries paths, stack traces or secrets.
    ``param`` names the form field to blame; ``retry_after_s`` says in how many seconds a retry can succeed.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"
    default_retry_after_s: ClassVar[float | None] = None
    should_retry: ClassVar[bool] = True
    """False where the same request would fail again and cost as much; clients retry every 5xx otherwise."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after_s = retry_after_s if retry_after_s is not None else self.default_retry_after_s

    def to_body(self) -> dict[str, dict[str, str | None]]:
        """The envelope, ready for JSON."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that belong to this failure; ``Retry-After`` in whole seconds, never below one.

        ``x-should-retry: false`` is what the official ``openai`` clients read.
        """
        if not self.should_retry:
            return {"x-should-retry": "false"}
        if self.retry_after_s is None:
            return {}
        wait_s = max(self.retry_after_s, 0.001)
        return {
            "Retry-After": str(max(1, math.ceil(wait_s))),
            "retry-after-ms": str(math.ceil(wait_s * 1000)),
        }


class ClientError(AsrError):
    """The caller must change something before trying again."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_request"


class InvalidRequestError(ClientError):
    """The request is malformed: a field is missing, doubled, unknown or of the wrong type."""


class UndecodableAudioError(ClientError):
    """The file's bytes hold no audio that can be decoded."""

    default_code = "undecodable_audio"

    def __init__(self, message: str, *, param: str | None = "file", code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)


class AuthenticationError(ClientError):
    """No API key, or one that is not known."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "WWW-Authenticate": 'Bearer realm="asr"'}


class PermissionDeniedError(ClientError):
    """The key is known but may not do this."""

    status = 403
    type = "permission_error"
    default_code = "permission_denied"


class NotFoundError(ClientError):
    """No such route or object."""

    status = 404
    default_code = "not_found"


class ModelNotFoundError(NotFoundError):
    """No loaded model has this name."""

    default_code = "model_not_found"

    def __init__(self, model: str, loaded: Sequence[str] = (), *, param: str | None = "model") -> None:
        known = ", ".join(loaded) or "none"
        super().__init__(f"No model named {model!r} is loaded; loaded models: {known}.", param=param)
        self.model = model


class MethodNotAllowedError(ClientError):
    """The route exists, for another method."""

    status = 405
    default_code = "method_not_allowed"


class UploadTimeoutError(ClientError):
    """The body stopped arriving before it was complete."""

    status = 408
    default_code = "upload_timeout"
    should_retry = False


class StreamTimeoutError(ClientError):
    """Nothing came over a live session for too long, or it has lasted too long."""

    status = 408
    default_code = "stream_timeout"
    should_retry = False


class UploadTooLargeError(ClientError):
    """The body is over the byte limit; reading stopped there."""

    status = 413
    default_code = "upload_too_large"

    def __init__(self, limit_bytes: int, *, param: str | None = "file", together: bool = False) -> None:
        """``together``: the limit of all files of a request."""
        what, cut = ("upload is", "cut the recording")
        if together:
            what, cut = ("files are together", "send fewer at a time")
        super().__init__(
            f"The {what} larger than the limit of {limit_bytes} bytes ({limit_bytes / 2**20:.1f} MiB). "
            f"Send a compressed format (opus, mp3, flac), or {cut}.",
            param=param,
        )
        self.limit_bytes = limit_bytes


class InvalidValueError(ClientError):
    """A field is of the right type but its value is not one we accept."""

    status = 422
    default_code = "invalid_value"


class AudioTooLongError(ClientError):
    """The decoded audio is longer than the cap, counted on samples and not on what the header says."""

    status = 422
    default_code = "audio_too_long"

    def __init__(
        self, limit_s: float, *, limit_samples: int | None = None, param: str | None = "file"
    ) -> None:
        """``limit_samples``: the limit that was passed, where it is that of the samples in all channels."""
        what, cut = f"is longer than the limit of {limit_s:g} seconds", "Cut it"
        if limit_samples is not None:
            what = f"has more than the limit of {limit_samples} samples in all channels together"
            cut = "Mix it down to one channel, or cut it"
        super().__init__(f"The audio {what}. {cut} and send the parts.", param=param)
        self.limit_s = limit_s


class RetryLaterError(AsrError):
    """The same request can succeed later; the answer always says when."""

    status = 503
    default_retry_after_s = 1.0


class QueueFullError(RetryLaterError):
    """The bounded queue has no room for this audio."""

    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"


class RateLimitedError(RetryLaterError):
    """This caller sends more than its share."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class StreamsFullError(RetryLaterError):
    """As many live sessions are open as may be."""

    status = 429
    type = "rate_limit_error"
    default_code = "too_many_streams"
    default_retry_after_s = 10.0


class NotReadyError(RetryLaterError):
    """Models are still being loaded and warmed up."""

    default_code = "not_ready"
    default_retry_after_s = 2.0


class DrainingError(RetryLaterError):
    """The process is shutting down and takes no new work."""

    default_code = "draining"
    default_retry_after_s = 5.0


class OutOfResourcesError(RetryLaterError):
    """The machine has no disk or memory left for this request."""

    default_code = "out_of_resources"
    default_retry_after_s = 10.0


class DeadlineExceededError(AsrError):
    """The answer was not ready in time."""

    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"
    should_retry = False


class InferenceError(AsrError):
    """The engine failed on this request's batch."""

    default_code = "inference_failed"
    should_retry = False


class InternalError(AsrError):
    """Something that nobody thought of; the log has it."""

    should_retry = False


class ClientDisconnected(AsrError):  # noqa: N818  it is not an error of ours
    """The caller left; the work was dropped. Status 499 appears in metrics and logs only."""

    status = 499
    type = "client_disconnected"
    default_code = "client_disconnected"

    def __init__(self, message: str = "The client closed the connection.") -> None:
        super().__init__(message)


class BundleError(Exception):
    """A model folder is refused: names the bundle, the field or file at fault, and its value."""

    def __init__(self, bundle: str, field: str, value: object, problem: str) -> None:
        super().__init__(f"bundle {bundle!r}: {field} = {value!r}: {problem}")
        self.bundle = bundle
        self.field = field
        self.value = value
        self.problem = problem


class InstallationError(RuntimeError):
    """Something that the service is made of is missing; the message says what to do."""


class SettingsError(ValueError):
    """A setting is unsafe or impossible; the message has one line per problem, naming the variable."""


_CODE_OF_STATUS: Mapping[int, tuple[str, str]] = {
    401: (AuthenticationError.type, AuthenticationError.default_code),
    403: (PermissionDeniedError.type, PermissionDeniedError.default_code),
    404: (NotFoundError.type, NotFoundError.default_code),
    405: (MethodNotAllowedError.type, MethodNotAllowedError.default_code),
    429: (RateLimitedError.type, RateLimitedError.default_code),
    503: (NotReadyError.type, NotReadyError.default_code),
}

# pydantic's names for "the value has the right type but is out of range"; anything else is a bad form.
_RANGE_ERRORS = frozenset(
    {
        "enum",
        "finite_number",
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "literal_error",
        "multiple_of",
        "string_pattern_mismatch",
        "string_too_long",
        "string_too_short",
        "too_long",
        "too_short",
        "value_error",
    }
)


_LONGEST_SHOWN = 40


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ClientError:
    """FastAPI's (pydantic's) validation errors as one error of ours, blaming the first field.

    A value out of range is 422; a missing field or a wrong type is 400. A short value is named.
    """
    lines = [f"{_field_of(error)}: {error.get('msg', 'invalid')}{_given(error)}" for error in errors[:5]]
    message = "; ".join(lines) or "The request is not valid."
    param = _field_of(errors[0]) if errors else None
    in_range_only = bool(errors) and all(error.get("type") in _RANGE_ERRORS for error in errors)
    return (InvalidValueError if in_range_only else InvalidRequestError)(message, param=param)


def _given(error: Mapping[str, Any]) -> str:
    """The value at fault, where it is short and no text of its own (a prompt, a list, a whole form)."""
    value = error.get("input")
    if error.get("type") == "missing" or not isinstance(value, str | int | float):
        return ""
    shown = repr(value)
    return f" (given: {shown})" if len(shown) <= _LONGEST_SHOWN else ""


def _field_of(error: Mapping[str, Any]) -> str:
    parts = [str(part) for part in error.get("loc", ()) if part not in ("body", "query", "path", "header")]
    return ".".join(parts) or "body"


def public(error: Exception, request_id: str | None = None) -> AsrError:
    """What the caller may know: an exception that is not ours reveals nothing but the request id."""
    if isinstance(error, AsrError):
        return error
    if isinstance(error, MemoryError):
        return OutOfResourcesError("The machine has no memory left for this request.")
    message = "An unexpected error happened on the server."
    if request_id:
        message += f" Quote request id {request_id} when reporting it."
    return InternalError(message)


def to_response(error: Exception, request_id: str | None = None) -> JSONResponse:
    """The single mapping from any exception to an HTTP answer."""
    if isinstance(error, HTTPException):
        return _from_http_exception(error)
    shown = public(error, request_id)
    return JSONResponse(shown.to_body(), status_code=shown.status, headers=shown.headers())


def _from_http_exception(error: HTTPException) -> JSONResponse:
    """What Starlette itself raises: unknown routes, wrong methods, bad bodies."""
    status = error.status_code
    fallback = (
        ("server_error", "internal_error") if status >= 500 else ("invalid_request_error", "bad_request")
    )
    error_type, code = _CODE_OF_STATUS.get(status, fallback)
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Error"
    message = error.detail if isinstance(error.detail, str) and error.detail else phrase
    if status == 404 and message == "Not Found":
        message = "There is no such route. GET / lists what there is."
    if status == 405 and message == "Method Not Allowed":
        message = "This route does not take that method."
    headers = dict(error.headers or {})
    if status in (429, 503) and not any(name.lower() == "retry-after" for name in headers):
        headers["Retry-After"] = "1"
        headers["retry-after-ms"] = "1000"
    body = {"error": {"message": message, "type": error_type, "param": None, "code": code}}
    return JSONResponse(body, status_code=status, headers=headers)
