"""The service's load now, read from its ``/metrics`` page (Prometheus text exposition format 0.0.4)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

# name, labels in braces, value; then perhaps a timestamp and, in OpenMetrics, an exemplar after "#"
_SAMPLE = re.compile(
    r"""^([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(\S+)(?:\s+[-\d.]+)?\s*(?:\#.*)?$"""
)
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Load:
    """What the overview shows; None where the service does not export the metric.

    queue_audio_s of queue_limit_audio_s seconds of audio wait; worker_busy is a share in [0, 1].
    """

    queue_depth: float | None = None
    queue_audio_s: float | None = None
    queue_limit_audio_s: float | None = None
    inflight: float | None = None
    worker_busy: float | None = None
    requests: float | None = None
    rejections: float | None = None
    audio_computed_s: float | None = None
    compute_s: float | None = None


def parse_metrics(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Samples by metric name. Comments and lines that are not samples are passed over."""
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in text.splitlines():
        found = None if line.startswith("#") else _SAMPLE.match(line)
        if found is None:
            continue
        name, labels, value = found.groups()
        try:
            number = float(value)
        except ValueError:
            continue
        samples.setdefault(name, []).append((dict(_LABEL.findall(labels or "")), number))
    return samples


def load_from_metrics(text: str) -> Load:
    """Sums over labels for counters and gauges, the mean for the workers' busy share."""
    samples = parse_metrics(text)

    def values(name: str) -> list[float]:
        return [value for _, value in samples.get(name, []) if math.isfinite(value)]

    def total(name: str) -> float | None:
        found = values(name)
        return sum(found) if found else None

    busy = values("asr_worker_busy_ratio")
    return Load(
        queue_depth=total("asr_queue_depth"),
        queue_audio_s=total("asr_queue_audio_seconds"),
        queue_limit_audio_s=total("asr_queue_limit_audio_seconds"),
        inflight=total("asr_inflight_requests"),
        worker_busy=sum(busy) / len(busy) if busy else None,
        requests=total("asr_requests_total"),
        rejections=total("asr_rejections_total"),
        audio_computed_s=total("asr_audio_computed_seconds_total"),
        compute_s=total("asr_compute_seconds_total"),
    )
