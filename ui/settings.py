"""What the page needs to know, read once from the environment.

The page does not share the service's settings class: it is another process, often another machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


class UiSettingsError(ValueError):
    """A setting that cannot be used; the message names the variable and its value."""


@dataclass(frozen=True)
class UiSettings:
    """Settings of the page; ``from_env`` reads them.

    api_url: the service, ``ASR_API_URL``. The page's own server calls it, the browser never does.
    api_key: sent as a bearer token, ``ASR_API_KEY``; None when the service asks for none.
    jaeger_url, grafana_url: addresses *as the person's browser reaches them*; the links appear only when set.
    parallel_files: how many files of one drop are sent at the same time.
    timeout_s: how long one request may stay silent before the page gives up on it.
    """

    api_url: str = "http://127.0.0.1:8000"
    api_key: str | None = None
    jaeger_url: str | None = None
    grafana_url: str | None = None
    parallel_files: int = 2
    timeout_s: float = 300.0

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> UiSettings:
        """Settings from ``environ`` (default: the process's own).

        Raises:
            UiSettingsError: an address that is not http(s), or a number out of range.
        """
        env = os.environ if environ is None else environ
        return cls(
            api_url=_url(env, "ASR_API_URL") or cls.api_url,
            api_key=env.get("ASR_API_KEY", "").strip() or None,
            jaeger_url=_url(env, "ASR_UI_JAEGER_URL"),
            grafana_url=_url(env, "ASR_UI_GRAFANA_URL"),
            parallel_files=int(_number(env, "ASR_UI_PARALLEL_FILES", cls.parallel_files, 1, 16)),
            timeout_s=_number(env, "ASR_UI_TIMEOUT_S", cls.timeout_s, 1, 86_400),
        )

    def trace_url(self, trace_id: str) -> str | None:
        """Where Jaeger shows this trace, or None when no Jaeger is configured."""
        return f"{self.jaeger_url}/trace/{trace_id}" if self.jaeger_url and trace_id else None


def _url(env: Mapping[str, str], name: str) -> str | None:
    value = env.get(name, "").strip().rstrip("/")
    if not value:
        return None
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UiSettingsError(f"{name}={value!r} is not an http:// or https:// address")
    return value


def _number(env: Mapping[str, str], name: str, default: float, low: float, high: float) -> float:
    text = env.get(name, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        raise UiSettingsError(f"{name}={text!r} is not a number") from None
    if not math.isfinite(value) or not low <= value <= high:
        raise UiSettingsError(f"{name}={text} must lie between {low:g} and {high:g}")
    return value
