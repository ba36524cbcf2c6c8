"""Every error class: its status, its envelope, its headers; and the mapping of what is not ours."""

from __future__ import annotations

import json

import pytest
from starlette.exceptions import HTTPException

from api import errors
from api.errors import AsrError, to_response

EXPECTED = {
    errors.AsrError("m"): (500, "server_error", "internal_error"),
    errors.InvalidRequestError("m"): (400, "invalid_request_error", "invalid_request"),
    errors.UndecodableAudioError("m"): (400, "invalid_request_error", "undecodable_audio"),
    errors.AuthenticationError("m"): (401, "authentication_error", "invalid_api_key"),
    errors.PermissionDeniedError("m"): (403, "permission_error", "permission_denied"),
    errors.NotFoundError("m"): (404, "invalid_request_error", "not_found"),
    errors.ModelNotFoundError("m"): (404, "invalid_request_error", "model_not_found"),
    errors.MethodNotAllowedError("m"): (405, "invalid_request_error", "method_not_allowed"),
    errors.UploadTimeoutError("m"): (408, "invalid_request_error", "upload_timeout"),
    errors.StreamTimeoutError("m"): (408, "invalid_request_error", "stream_timeout"),
    errors.UploadTooLargeError(1024): (413, "invalid_request_error", "upload_too_large"),
    errors.InvalidValueError("m"): (422, "invalid_request_error", "invalid_value"),
    errors.AudioTooLongError(60): (422, "invalid_request_error", "audio_too_long"),
    errors.QueueFullError("m"): (429, "rate_limit_error", "queue_full"),
    errors.RateLimitedError("m"): (429, "rate_limit_error", "rate_limit_exceeded"),
    errors.StreamsFullError("m"): (429, "rate_limit_error", "too_many_streams"),
    errors.NotReadyError("m"): (503, "server_error", "not_ready"),
    errors.DrainingError("m"): (503, "server_error", "draining"),
    errors.OutOfResourcesError("m"): (503, "server_error", "out_of_resources"),
    errors.DeadlineExceededError("m"): (504, "timeout_error", "deadline_exceeded"),
    errors.InferenceError("m"): (500, "server_error", "inference_failed"),
    errors.InternalError("m"): (500, "server_error", "internal_error"),
    errors.ClientDisconnected(): (499, "client_disconnected", "client_disconnected"),
}


def every_class(root: type[AsrError] = AsrError) -> set[type[AsrError]]:
    found = {root} if root.__module__ == "api.errors" else set()
    return found.union(*(every_class(child) for child in root.__subclasses__()))


def test_no_class_is_forgotten_here() -> None:
    abstract = {errors.ClientError, errors.RetryLaterError}
    assert every_class() - abstract == {type(error) for error in EXPECTED}


@pytest.mark.parametrize("error", EXPECTED, ids=lambda error: type(error).__name__)
def test_each_error_has_its_status_and_the_envelope(error: AsrError) -> None:
    status, error_type, code = EXPECTED[error]
    response = to_response(error)
    body = json.loads(response.body)
    assert response.status_code == status
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == error_type
    assert body["error"]["code"] == code
    assert body["error"]["message"]


@pytest.mark.parametrize("error", EXPECTED, ids=lambda error: type(error).__name__)
def test_retry_after_stands_on_every_429_and_503(error: AsrError) -> None:
    headers = to_response(error).headers
    if error.status in (429, 503):
        assert int(headers["retry-after"]) >= 1
        assert int(headers["retry-after-ms"]) >= 1
    else:
        assert "retry-after" not in headers


@pytest.mark.parametrize(
    ("error", "stops"),
    [
        (errors.DeadlineExceededError("m"), True),
        (errors.InferenceError("m"), True),
        (errors.UploadTimeoutError("m"), True),
        (RuntimeError("m"), True),
        (errors.QueueFullError("m"), False),
        (errors.DrainingError("m"), False),
        (MemoryError(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_clients_are_told_where_a_retry_only_costs(error: Exception, stops: bool) -> None:
    headers = to_response(error).headers
    assert (headers.get("x-should-retry") == "false") is stops
    assert ("retry-after" in headers) is not stops


@pytest.mark.parametrize(
    ("retry_after_s", "seconds", "milliseconds"),
    [(0.2, "1", "200"), (1.5, "2", "1500"), (0.0, "1", "1"), (299.99, "300", "299990")],
)
def test_retry_after_is_never_shorter_than_promised(
    retry_after_s: float, seconds: str, milliseconds: str
) -> None:
    headers = errors.QueueFullError("m", retry_after_s=retry_after_s).headers()
    assert (headers["Retry-After"], headers["retry-after-ms"]) == (seconds, milliseconds)


def test_missing_key_says_how_to_authenticate() -> None:
    assert to_response(errors.AuthenticationError("m")).headers["www-authenticate"] == 'Bearer realm="asr"'


def test_size_error_names_the_limit() -> None:
    assert "26214400 bytes (25.0 MiB)" in errors.UploadTooLargeError(26_214_400).message


def test_length_error_names_the_limit() -> None:
    assert "7200 seconds" in errors.AudioTooLongError(7200.0).message


def test_unknown_model_names_the_loaded_ones() -> None:
    error = errors.ModelNotFoundError("gpt", ["tiny", "large"])
    assert "tiny, large" in error.message
    assert error.param == "model"


def test_unexpected_exceptions_reveal_nothing_but_the_request_id() -> None:
    response = to_response(RuntimeError("password=hunter2 in /etc/secret"), "abc123")
    text = bytes(response.body).decode()
    assert response.status_code == 500
    assert "abc123" in text
    assert "hunter2" not in text
    assert "/etc" not in text


def test_out_of_memory_asks_to_come_back() -> None:
    response = to_response(MemoryError("cannot allocate 3 GiB"))
    assert response.status_code == 503
    assert "retry-after" in response.headers


@pytest.mark.parametrize("status", [400, 404, 405, 413, 429, 500, 503])
def test_starlettes_own_errors_get_the_envelope(status: int) -> None:
    response = to_response(HTTPException(status))
    body = json.loads(response.body)
    assert response.status_code == status
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert ("retry-after" in response.headers) == (status in (429, 503))


@pytest.mark.parametrize(
    ("kind", "status"),
    [("missing", 400), ("int_parsing", 400), ("greater_than", 422), ("literal_error", 422)],
)
def test_validation_errors_are_400_for_form_and_422_for_range(kind: str, status: int) -> None:
    error = errors.from_validation(
        [{"type": kind, "loc": ("body", "beam"), "msg": "no good", "input": "many"}]
    )
    assert error.status == status
    assert error.param == "beam"
    assert error.message == "beam: no good" + (" (given: 'many')" if kind != "missing" else "")


@pytest.mark.parametrize("value", ["what somebody said, at some length " * 2, ["a"], {"beam": 1}, None])
def test_validation_errors_repeat_no_long_text_and_no_form(value: object) -> None:
    error = errors.from_validation([{"type": "literal_error", "loc": ("x",), "msg": "no", "input": value}])
    assert error.message == "x: no"


def test_bundle_error_names_bundle_field_and_value() -> None:
    assert str(errors.BundleError("tiny", "blank_id", 99, "expected 0 to 9")) == (
        "bundle 'tiny': blank_id = 99: expected 0 to 9"
    )
