"""The registry: names, bounded labels, isolation, exposition."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from api.telemetry import (
    OUTCOMES,
    REJECTION_REASONS,
    STAGES,
    TRANSCRIPTION_ROUTES,
    Metrics,
    Telemetry,
)
from api.telemetry.busy import BusyWindow
from api.telemetry.record import RequestEnd, outcome_of
from api.telemetry.resources import MemoryCollector, memory_limit_bytes, memory_used_bytes

# As written in docs/architecture.md, section Observability.
DOCUMENTED = {
    "asr_requests_total": {"route", "model", "outcome"},
    "asr_request_duration_seconds": {"route", "model"},
    "asr_stage_duration_seconds": {"stage"},
    "asr_audio_duration_seconds": {"model"},
    "asr_audio_processed_seconds_total": {"model", "language"},
    "asr_compute_seconds_total": {"model"},
    "asr_audio_computed_seconds_total": {"model"},
    "asr_real_time_factor": {"model"},
    "asr_queue_depth": set(),
    "asr_queue_audio_seconds": set(),
    "asr_queue_limit_audio_seconds": set(),
    "asr_segments_dropped_total": {"reason"},
    "asr_batch_size": set(),
    "asr_batch_padding_ratio": set(),
    "asr_rejections_total": {"reason"},
    "asr_inflight_requests": set(),
    "asr_worker_busy_ratio": set(),
    "asr_time_to_first_result_seconds": {"transport"},
    "asr_stream_sessions": {"protocol"},
    "asr_stream_sessions_ended_total": {"protocol", "end"},
    "asr_confidence": {"model", "language"},
    "asr_model_loaded": {"model"},
    "asr_model_load_seconds": {"model"},
    "asr_model_info": {"model", "revision", "quantization", "provider", "kernels"},
    "asr_build_info": {"version", "commit"},
}


def used_telemetry() -> Telemetry:
    telemetry = Telemetry(version="1.2.3", commit="abc")
    telemetry.model_loaded(
        "m", languages=["en"], revision="1", quantization="int8", provider="cpu", kernels="vnni", load_s=0.5
    )
    telemetry.engine_configured(workers=2, threads_per_worker=1, max_batch=2, cpu_limit_cores=2.0)
    with telemetry.batch(model="m", lengths_s=[1.0, 3.0]):
        pass
    telemetry.transcribed(model="m", language="en", audio_s=4.0, processing_s=1.0, confidence=0.9)
    telemetry.metrics.time_to_first_result.labels("http").observe(0.1)
    return telemetry


def samples(telemetry: Telemetry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = generate_latest(telemetry.metrics.registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(telemetry: Telemetry, name: str, **labels: str) -> float:
    return samples(telemetry)[(name, tuple(sorted(labels.items())))]


def test_every_documented_metric_exists_with_its_labels() -> None:
    telemetry = used_telemetry()
    text = generate_latest(telemetry.metrics.registry).decode()
    seen: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = re.sub(r"_(bucket|count|sum)$", "", sample.name)
            seen.setdefault(name, set()).update(set(sample.labels) - {"le"})
    assert {name for name in DOCUMENTED if name not in seen} == set()
    assert {name: seen[name] for name, labels in DOCUMENTED.items() if not labels <= seen[name]} == {}
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "python_info"} <= set(seen)


def test_two_applications_share_no_number() -> None:
    first, second = Telemetry(), Telemetry()
    first.metrics.reject("queue_full")
    assert value(first, "asr_rejections_total", reason="queue_full") == 1
    assert value(second, "asr_rejections_total", reason="queue_full") == 0


def test_labels_that_a_caller_chose_become_unknown() -> None:
    telemetry = used_telemetry()
    for number in range(50):
        telemetry.transcribed(
            model=f"made-up-{number}",
            language=f"x{number}",
            audio_s=1.0,
            processing_s=0.1,
            confidence=None,
        )
        telemetry.metrics.reject(f"reason-{number}")
    assert value(telemetry, "asr_audio_processed_seconds_total", model="unknown", language="unknown") == 50
    assert not any(
        "made-up" in text or "reason-" in text for _, labels in samples(telemetry) for _, text in labels
    )


def test_series_of_requests_start_at_zero() -> None:
    telemetry = used_telemetry()
    for model in ("m", "unknown"):
        for outcome in OUTCOMES:
            found = value(telemetry, "asr_requests_total", route="/transcribe", model=model, outcome=outcome)
            assert found == 0
    assert all(value(telemetry, "asr_rejections_total", reason=reason) == 0 for reason in REJECTION_REASONS)


def test_series_of_failed_answers_start_at_zero() -> None:
    """Of the statuses whose rate is looked at when it jumps, and of no more: each is a whole histogram."""
    telemetry = used_telemetry()
    name = "http_server_request_duration_seconds_count"
    found = {labels: count for (sample, labels), count in samples(telemetry).items() if sample == name}
    assert set(found.values()) == {0}
    assert {(dict(labels)["http_route"], dict(labels)["http_response_status_code"]) for labels in found} == {
        (route, status) for route in TRANSCRIPTION_ROUTES for status in ("500", "503", "504")
    }
    telemetry.request_ended(failed_request(), None)
    telemetry.flush()
    after = {labels: count for (sample, labels), count in samples(telemetry).items() if sample == name}
    assert {labels for labels, count in after.items() if count} <= set(found)
    assert sum(after.values()) == 1


def failed_request() -> RequestEnd:
    return RequestEnd(
        method="POST",
        route="/transcribe",
        status=500,
        answered=500,
        elapsed_s=0.1,
        end_ns=1,
        cancelled=False,
        error=None,
        cut_off=False,
        origin=None,
    )


def test_a_batch_counts_its_size_padding_and_compute() -> None:
    telemetry = used_telemetry()
    assert value(telemetry, "asr_batch_size_sum") == 2
    # Rows of 1 s and 3 s are padded to 6 s, of which 2 s are padding.
    assert value(telemetry, "asr_batch_padding_ratio_sum") == pytest.approx(1 / 3)
    assert 0 < value(telemetry, "asr_compute_seconds_total", model="m") < 1


def test_audio_is_counted_where_its_compute_is_also_of_batches_that_fail() -> None:
    telemetry = used_telemetry()
    assert value(telemetry, "asr_audio_computed_seconds_total", model="m") == 4
    with pytest.raises(RuntimeError), telemetry.batch(model="m", lengths_s=[2.0]):
        raise RuntimeError
    assert value(telemetry, "asr_audio_computed_seconds_total", model="m") == 6
    assert value(telemetry, "asr_audio_processed_seconds_total", model="m", language="en") == 4


def test_an_empty_recording_has_no_real_time_factor() -> None:
    telemetry = used_telemetry()
    telemetry.transcribed(model="m", language="en", audio_s=0.0, processing_s=0.1, confidence=None)
    assert value(telemetry, "asr_real_time_factor_count", model="m") == 1
    assert value(telemetry, "asr_confidence_count", model="m", language="en") == 1
    assert value(telemetry, "asr_audio_duration_seconds_count", model="m") == 2


def test_a_stage_outside_the_vocabulary_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        Telemetry().stage("somewhere")


def test_stages_observe_what_they_time_also_when_they_fail() -> None:
    telemetry = Telemetry()
    for stage in STAGES:
        with telemetry.stage(stage) as timed:
            pass
        assert timed.elapsed_s >= 0
    with pytest.raises(ValueError, match="inside"), telemetry.stage("decode"):
        raise ValueError("inside")
    assert value(telemetry, "asr_stage_duration_seconds_count", stage="decode") == 2
    assert value(telemetry, "asr_stage_duration_seconds_count", stage="ctc") == 1


def test_stages_may_run_in_many_threads() -> None:
    telemetry = Telemetry()

    def work() -> None:
        for _ in range(200):
            with telemetry.stage("ctc"), telemetry.batch(model="m", lengths_s=[1.0]):
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(telemetry, "asr_stage_duration_seconds_count", stage="ctc") == 1600
    assert value(telemetry, "asr_batch_size_count") == 1600


def test_busy_window_counts_running_and_finished_work() -> None:
    window = BusyWindow(window_s=60.0)
    window.workers = 2
    assert window.ratio() == 0
    done = threading.Event()

    def work() -> None:
        window.begin()
        done.wait(20)
        window.end()

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    time.sleep(0.05)
    assert window.ratio() > 0.5
    done.set()
    for worker in workers:
        worker.join()
    before = window.ratio()
    time.sleep(0.1)
    assert 0 < window.ratio() < before


def test_busy_window_forgets() -> None:
    window = BusyWindow(window_s=0.05)
    window.workers = 1
    window.begin()
    window.end()
    time.sleep(0.1)
    assert window.ratio() == 0


@pytest.mark.parametrize(
    ("status", "code", "outcome"),
    [
        (200, None, "ok"),
        (400, "undecodable_audio", "invalid"),
        (404, "model_not_found", "invalid"),
        (413, "upload_too_large", "invalid"),
        (422, "audio_too_long", "invalid"),
        (401, "invalid_api_key", "unauthorized"),
        (403, "permission_denied", "unauthorized"),
        (408, "upload_timeout", "cancelled"),
        (499, "client_disconnected", "cancelled"),
        (429, "queue_full", "rejected"),
        (429, "rate_limit_exceeded", "limited"),
        (503, "draining", "rejected"),
        (503, "not_ready", "rejected"),
        (504, "deadline_exceeded", "timeout"),
        (500, "inference_failed", "error"),
        (500, None, "error"),
    ],
)
def test_outcome_of_status_and_code(status: int, code: str | None, outcome: str) -> None:
    assert outcome_of(status, code) == outcome
    assert outcome in OUTCOMES


def test_memory_limit_follows_the_cgroup(tmp_path) -> None:  # type: ignore[no-untyped-def]
    machine = memory_limit_bytes(tmp_path)
    assert machine > 2**28
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit_bytes(tmp_path) == machine
    (tmp_path / "memory.max").write_text("134217728\n")
    assert memory_limit_bytes(tmp_path) == 134217728
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory_limit_bytes(tmp_path) == machine
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("268435456\n")
    assert memory_limit_bytes(tmp_path) == 268435456


@pytest.mark.parametrize(
    ("folder", "limit", "usage", "reclaimable"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["version 2", "version 1"],
)
def test_used_memory_is_the_cgroups_without_what_it_would_give_back(
    tmp_path: Path, folder: str, limit: str, usage: str, reclaimable: str
) -> None:
    group = tmp_path / folder
    group.mkdir(exist_ok=True)
    registry = CollectorRegistry()
    registry.register(MemoryCollector(tmp_path))
    (group / usage).write_text("379000000\n")
    # Version 1 has the group's own numbers first, and those with its children under total_.
    statistics = f"inactive_file 5\nshmem 220000000\n{reclaimable} 9000000\nunevictable 0\n"
    (group / "memory.stat").write_text(statistics)
    (group / limit).write_text("9223372036854771712\n" if folder else "max\n")
    assert memory_used_bytes(tmp_path) is None, "without a limit of its own it may be the whole machine"
    assert registry.get_sample_value("asr_memory_used_bytes") is None
    (group / limit).write_text("420000000\n")
    assert memory_used_bytes(tmp_path) == 370000000
    assert registry.get_sample_value("asr_memory_used_bytes") == 370000000
    (group / usage).write_text("8000000\n")
    assert memory_used_bytes(tmp_path) == 0, "the files are not read at the same moment"
    for broken in ("", "inactive_file\n", "shmem 1\n"):
        (group / "memory.stat").write_text(broken)
        assert memory_used_bytes(tmp_path) is None
    (group / "memory.stat").unlink()
    assert memory_used_bytes(tmp_path) is None


def test_used_memory_is_unknown_outside_of_a_cgroup(tmp_path: Path) -> None:
    assert memory_used_bytes(tmp_path) is None
    registry = CollectorRegistry()
    registry.register(MemoryCollector(tmp_path))
    assert generate_latest(registry) == b""


@pytest.mark.telemetry
def test_promtool_finds_nothing_to_correct() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    exposition = generate_latest(used_telemetry().metrics.registry)
    checked = subprocess.run(["promtool", "check", "metrics"], input=exposition, capture_output=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_metrics_object_alone_is_complete() -> None:
    assert Metrics(version="1", commit="c", environment="production").registry.get_sample_value(
        "asr_build_info",
        {
            "version": "1",
            "commit": "c",
            "environment": "production",
            "python": platform.python_version(),
        },
    )
