"""A real API process with a model that hears tones, and recordings for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loadtest.local_stack import LocalStack
from loadtest.processes import LiveServer
from tests.telemetry.otlp_receiver import OtlpReceiver
from tests.tiny_bundle import make_bundle, sing, wav

MODEL = "tiny"


def settings(folder: Path, **more: str) -> dict[str, str]:
    """Settings that serve the tiny bundle from `folder` (made there if need be)."""
    if not (folder / MODEL).exists():
        make_bundle(folder, MODEL)
    return {
        "ASR_MODELS_DIR": str(folder),
        "ASR_MODELS": MODEL,
        "ASR_WORKERS": "1",
        "ASR_CALIBRATE": "false",
        **more,
    }


def tracing(receiver: OtlpReceiver, protocol: str = "grpc") -> dict[str, str]:
    """Variables that send spans to `receiver` soon after they end."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.grpc_endpoint
        if protocol == "grpc"
        else receiver.http_endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }


def clip(text: str = "bad cafe") -> bytes:
    """A short recording of `text`."""
    return wav(sing(text))


def transcribe(api: LiveServer, content: bytes, **fields: str) -> httpx.Response:
    """One POST /transcribe."""
    return httpx.post(f"{api.url}/transcribe", files={"file": content}, data=fields, timeout=60.0)


def metric_sum(api: LiveServer, name: str, **labels: str) -> float:
    """Sum over the series of `name` that have `labels`, as /metrics shows them now."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    total = 0.0
    for line in httpx.get(f"{api.url}/metrics", timeout=30.0).text.splitlines():
        if line.startswith((f"{name}{{", f"{name} ")) and all(pair in line for pair in wanted):
            total += float(line.rpartition(" ")[2])
    return total


@pytest.fixture
def stack() -> Iterator[LocalStack]:
    with LocalStack() as started:
        yield started
