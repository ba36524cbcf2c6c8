"""Failures in plain words: what happened, and what a person can do about it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ui import errors
from ui.strings import Strings

_KEYS: tuple[tuple[type[errors.ApiError], str], ...] = (
    (errors.UndecodableAudioError, "undecodable"),
    (errors.AudioTooLongError, "too_long"),
    (errors.UploadTooLargeError, "too_large"),
    (errors.AccessError, "access"),
    (errors.UnknownModelError, "model"),
    (errors.InvalidValueError, "value"),
    (errors.BadRequestError, "value"),
    (errors.BusyError, "busy"),
    (errors.NotReadyError, "starting"),
    (errors.DeadlineError, "late"),
    (errors.ServerFaultError, "server"),
    (errors.ApiTimeoutError, "late"),
    (errors.ApiProtocolError, "protocol"),
    (errors.ApiUnreachableError, "down"),
    (errors.PageFaultError, "page"),
)


@dataclass(frozen=True)
class Problem:
    """A failure as the page says it. ``said`` is the service's own message, where it adds something."""

    title: str
    advice: str
    said: str = ""
    can_retry: bool = True


def explain(error: errors.ApiError, strings: Strings, max_upload_bytes: int | None = None) -> Problem:
    """Words for a failed call."""
    key = next((key for kind, key in _KEYS if isinstance(error, kind)), "server")
    if isinstance(error, errors.NotReadyError) and error.code == "draining":
        key = "draining"
    values: dict[str, object] = {}
    if isinstance(error, errors.ApiStatusError):
        values["request_id"] = error.request_id or "–"
        values["seconds"] = max(1, math.ceil(error.retry_after_s or 5))
    advice_key = f"problem.{key}_do"
    if key == "too_large":
        if max_upload_bytes:
            values["limit"] = strings.number(max_upload_bytes / 2**20, ".4g")
        else:
            advice_key = "problem.too_large_unknown_do"
    told = isinstance(error, errors.BadRequestError | errors.InvalidValueError | errors.UnknownModelError)
    return Problem(
        title=strings(f"problem.{key}"),
        advice=strings(advice_key, **values) if values else strings(advice_key),
        said=strings("problem.said", message=error.message) if told else "",
        can_retry=key not in ("undecodable", "too_large", "too_long"),
    )


def explain_file(
    error: errors.ApiError, strings: Strings, max_upload_bytes: int | None = None, *, empty: bool = False
) -> Problem:
    """Words for a file that failed. The page looks for the service again, but sends no file once more."""
    if empty:
        return Problem(strings("problem.empty"), strings("problem.empty_do"), can_retry=False)
    problem = explain(error, strings, max_upload_bytes)
    if isinstance(error, errors.ApiUnreachableError | errors.NotReadyError):
        return replace(problem, advice=strings("problem.back_do"))
    return problem


def explain_state(state: str, error: errors.ApiError | None, strings: Strings) -> Problem:
    """Words for a service that cannot be used now."""
    if isinstance(error, errors.ApiTimeoutError | errors.DeadlineError):
        return Problem(strings("problem.late"), strings("problem.hung_do"))
    if error is not None:
        return explain(error, strings)
    key = {"draining": "draining", "closing": "draining", "failed": "failed"}.get(state, "starting")
    return Problem(strings(f"problem.{key}"), strings(f"problem.{key}_do"))
