"""make e2e-lambda: the Lambda image, started and invoked as Lambda does it, and what that takes.

Builds the image, starts it a few times on a read-only file system, speaks the runtime API with it over a
socket (``tests/serverless/emulators.py``) and compares its transcripts with each other. E2E_BUILD=0 uses the
image that is here. Numbers are of this machine, without Lambda's own time for fetching the image.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import soundfile

from tests.e2e_docker.tools import (
    ROOT,
    Report,
    base_image,
    build,
    main,
    model_name,
    require_docker,
    run,
    succeeds,
)
from tests.serverless.emulators import Bucket, LambdaService, aws_variables, bucket, lambda_service
from tests.serverless.events import SECRET, coded, event, posted
from tests.tiny_bundle import SAMPLE_RATE_HZ

STARTS = 5
WARM_EVENTS = 50
START_TIMEOUT_S = 60.0
SAMPLE = ROOT / "samples" / "hello.flac"


def container(image: str, address: str, s3_url: str, **environment: str) -> str:
    """Start the image as Lambda would; the container's id."""
    variables = {
        **aws_variables(address, s3_url),
        "ASR_API_KEYS": f"tester:{SECRET}",
        **environment,
    }
    given = [f"--env={name}={value}" for name, value in variables.items()]
    return run(
        "docker", "run", "--detach", "--network=host", "--read-only", "--tmpfs=/tmp:size=1g,mode=1777",
        "--memory=3008m", *given, image,
    ).strip()  # fmt: skip


@contextmanager
def started(image: str, storage: Bucket) -> Iterator[tuple[LambdaService, str, float]]:
    """A function that waits for its first event, its container, and the seconds that took."""
    with lambda_service() as service:
        begin_s = time.perf_counter()
        name = container(image, service.address, storage.url)
        try:
            if not service.waiting.wait(START_TIMEOUT_S):
                raise RuntimeError(f"no event was asked for:\n{run('docker', 'logs', '--tail', '30', name)}")
            yield service, name, time.perf_counter() - begin_s
        finally:
            succeeds("docker", "rm", "--force", name)


def invoke(service: LambdaService, made: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The answer to an event through the gateway, and the milliseconds it took. AssertionError unless 200."""
    begin_s = time.perf_counter()
    kind, answer = service.invoke(made)
    elapsed_ms = (time.perf_counter() - begin_s) * 1000
    assert kind == "response", answer
    assert answer["statusCode"] == 200, answer
    return json.loads(answer["body"]), elapsed_ms


def between(values: list[float], digits: int = 0) -> str:
    """Least and most, as text."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def memory(name: str) -> float:
    """MiB that the container uses now."""
    used = run("docker", "stats", "--no-stream", "--format", "{{.MemUsage}}", name).split("/")[0].strip()
    units = {"KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0}
    unit = next(unit for unit in units if used.endswith(unit))
    return float(used.removesuffix(unit)) * units[unit]


def measure(report: Report, image: str, storage: Bucket) -> None:
    """Starts, first and further events, another format, memory."""
    samples, rate_hz = soundfile.read(SAMPLE, dtype="float32")
    clip = np.asarray(samples if samples.ndim == 1 else samples[:, 0], np.float32)
    assert rate_hz == SAMPLE_RATE_HZ
    flac = posted("/transcribe", SAMPLE.read_bytes())
    mp3 = posted("/transcribe", coded(clip, "mp3", "libmp3lame", 44_100))
    starts, firsts, warms, first_mp3s, used = [], [], [], [], []
    texts = set()
    for _ in range(STARTS):
        with started(image, storage) as (service, name, start_s):
            starts.append(start_s)
            body, first_ms = invoke(service, flac)
            firsts.append(first_ms)
            texts.add(body["text"])
            warms.append(statistics.median(invoke(service, flac)[1] for _ in range(WARM_EVENTS)))
            used.append(memory(name))
            first_mp3s.append(invoke(service, mp3)[1])
    report.check(len(texts) == 1 and texts != {""}, f"text: {texts.pop()!r} from every start")
    report.check(True, f"start: {between(starts, 2)} s until an event is asked for ({STARTS} starts)", starts)
    report.check(True, f"first event: {between(firsts)} ms", firsts)
    report.check(True, f"warm event: {between(warms)} ms (medians of {WARM_EVENTS})", warms)
    report.check(True, f"first MP3: {between(first_mp3s)} ms", first_mp3s)
    report.check(True, f"memory: {between(used)} MiB after {WARM_EVENTS + 1} events", used)


def behaviour(report: Report, image: str, storage: Bucket) -> None:
    """The bucket's way, refusals, and a start that must fail."""
    with started(image, storage) as (service, _, _):
        by_gateway, _ = invoke(service, posted("/transcribe", SAMPLE.read_bytes()))
        storage.objects["recordings/incoming/two words (café).wav"] = SAMPLE.read_bytes()
        begin_s = time.perf_counter()
        kind, answer = service.invoke(event("s3"))
        s3_ms = (time.perf_counter() - begin_s) * 1000
        assert kind == "response", answer
        stored = json.loads(storage.objects[f"recordings/{answer['objects'][0]['transcript']}"])
        report.check(
            stored["text"] == by_gateway["text"], f"first S3 event: {s3_ms:.0f} ms, the same text", s3_ms
        )
        keyless = posted("/transcribe", SAMPLE.read_bytes())
        del keyless["headers"]["authorization"]
        report.check(service.invoke(keyless)[1]["statusCode"] == 401, "a missing key: 401")
        bad = service.invoke(posted("/transcribe", b"this is no audio"))[1]
        report.check(bad["statusCode"] == 400, "what is no audio: 400")
    with lambda_service() as service:
        name = container(image, service.address, storage.url, ASR_API_KEYS="")
        try:
            _, where, body = service.answers.get(timeout=START_TIMEOUT_S)
        finally:
            succeeds("docker", "rm", "--force", name)
        message = body["errorMessage"]
        report.check(where == "error" and "ASR_API_KEYS" in message, "without keys: it refuses to start")


def proof(report: Report) -> None:
    require_docker()
    report.step("the image")
    image = "asr-lambda:e2e"
    if os.environ.get("E2E_BUILD") != "0":
        image = build("lambda", "e2e", base_image(report), model_name())
    with bucket() as storage:
        report.step("what it answers")
        behaviour(report, image, storage)
        report.step("what it takes")
        measure(report, image, storage)


if __name__ == "__main__":
    main("e2e-lambda", proof)
