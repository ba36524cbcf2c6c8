"""The small parts under the client: waiting times, event streams, settings, spans."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ui.retry import RetryPolicy, retry_after_s
from ui.settings import UiSettings, UiSettingsError
from ui.sse import events
from ui.tracing import Tracing


def test_retry_after_reads_http_dates() -> None:
    now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
    assert retry_after_s({"retry-after": "Thu, 01 Jan 2026 12:00:30 GMT"}, now) == 30
    assert retry_after_s({"retry-after": "Thu, 01 Jan 2026 11:00:00 GMT"}, now) == 0
    assert retry_after_s({"retry-after": "whenever"}, now) is None
    assert retry_after_s({"retry-after": "-1"}, now) is None
    assert retry_after_s({}, now) is None


def test_backoff_doubles_and_is_capped() -> None:
    policy = RetryPolicy(max_retries=9, first_wait_s=1.0, longest_backoff_s=4.0, jitter=lambda: 1.0)
    assert [policy.wait_s(attempt, None, 503) for attempt in range(4)] == [1.0, 2.0, 4.0, 4.0]
    assert policy.wait_s(0, None, 400) is None
    assert policy.wait_s(0, None, 500) is None


async def _collect(chunks: list[bytes]) -> list[str]:
    async def source() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    return [event async for event in events(source())]


@given(st.lists(st.text().filter(lambda text: not {"\r", "\n"} & set(text)), min_size=1), st.data())
async def test_events_do_not_depend_on_how_the_bytes_are_cut(texts: list[str], data: st.DataObject) -> None:
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    stream = "".join(f"data: {text}{end}{end}" for text in texts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    edges = [0, *cuts, len(stream)]
    pieces = [stream[start:stop] for start, stop in pairwise(edges)]
    assert await _collect(pieces) == texts


async def test_comments_and_other_fields_are_passed_over_and_data_lines_joined() -> None:
    assert await _collect([b": hello\n\nevent: x\nid: 3\ndata: a\ndata: b\n\ndata: cut off"]) == ["a\nb"]


def test_settings_come_from_the_environment() -> None:
    settings = UiSettings.from_env(
        {"ASR_API_URL": "http://api:8000/", "ASR_API_KEY": " ", "ASR_UI_JAEGER_URL": "https://jaeger.test/ui"}
    )
    assert settings.api_url == "http://api:8000"
    assert settings.api_key is None
    assert settings.trace_url("ab") == "https://jaeger.test/ui/trace/ab"
    assert UiSettings().trace_url("ab") is None


@pytest.mark.parametrize(
    "env",
    [
        {"ASR_API_URL": "api:8000"},
        {"ASR_UI_GRAFANA_URL": "javascript:alert(1)"},
        {"ASR_UI_PARALLEL_FILES": "0"},
        {"ASR_UI_TIMEOUT_S": "nan"},
        {"ASR_UI_TIMEOUT_S": "soon"},
    ],
)
def test_a_wrong_setting_is_refused_by_name(env: dict[str, str]) -> None:
    with pytest.raises(UiSettingsError, match=next(iter(env))):
        UiSettings.from_env(env)


def test_a_failed_call_marks_its_span() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing({}, exporter)
    with (
        pytest.raises(ZeroDivisionError),
        tracing.span("POST", {"url.path": "/x"}) as handle,
    ):
        _ = 1 / 0
    tracing.close()
    (span,) = exporter.get_finished_spans()
    assert span.status.is_ok is False
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == handle.trace_id
    assert handle.trace_id in handle.headers["traceparent"]
