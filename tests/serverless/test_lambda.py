"""The Lambda container's own process, invoked with real events over the runtime API; S3 over boto3."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from api.settings import Settings, load_settings
from tests.serverless.emulators import Bucket, LambdaService, aws_variables, bucket, lambda_service
from tests.serverless.events import SECRET, coded, event, posted
from tests.tiny_bundle import SAMPLE_RATE_HZ, make_bundle, sing, wav

pytest.importorskip("boto3")
ROOT = Path(__file__).resolve().parents[2]


def environment(models: Path, address: str, url: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "NUMBA_CACHE_DIR") if name in os.environ}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        **aws_variables(address, url),
        "ASR_MODELS_DIR": str(models),
        "ASR_MODELS": "tiny",
        "ASR_API_KEYS": f"tester:{SECRET}",
        "ASR_CALIBRATE": "false",
        "ASR_WORKERS": "1",
        "OTEL_SDK_DISABLED": "true",
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def storage() -> Iterator[Bucket]:
    with bucket() as store:
        yield store


@pytest.fixture(scope="module")
def function(
    models: Path, storage: Bucket, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LambdaService]:
    """`python -m serverless.bootstrap`, warm; its cold start is printed."""
    log = tmp_path_factory.mktemp("function") / "log"
    with lambda_service() as service, log.open("w") as sink:
        started_s = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "serverless.bootstrap"],
            env=environment(models, service.address, storage.url),
            cwd=ROOT,
            stdout=sink,
            stderr=sink,
        )
        try:
            while not service.waiting.wait(0.2):
                if process.poll() is not None or time.perf_counter() - started_s > 180:
                    pytest.fail(f"the function did not start:\n{log.read_text()[-3000:]}")
            print(f"cold start {time.perf_counter() - started_s:.2f} s")
            yield service
        finally:
            process.kill()
            process.wait(timeout=30)


def test_http_api_transcribes(function: LambdaService) -> None:
    started_s = time.perf_counter()
    kind, answer = function.invoke(posted("/transcribe", wav(sing("abc def"))))
    print(f"first event {time.perf_counter() - started_s:.3f} s")
    assert (kind, answer["statusCode"]) == ("response", 200)
    body = json.loads(answer["body"])
    assert body["text"] == "abc def"
    assert body["model"] == "tiny"
    assert answer["headers"]["content-type"] == "application/json"
    started_s = time.perf_counter()
    function.invoke(posted("/transcribe", wav(sing("abc def"))))
    print(f"warm event {time.perf_counter() - started_s:.3f} s")


@pytest.mark.parametrize(
    ("container", "codec", "rate_hz"),
    [("mp3", "libmp3lame", 44_100), ("webm", "libopus", 48_000), ("mp4", "aac", 44_100)],
)
def test_any_format_without_ffmpeg(function: LambdaService, container: str, codec: str, rate_hz: int) -> None:
    audio = (
        coded(sing("abc def"), container, codec, rate_hz)
        if container != "mp4"
        else _mp4(sing("abc def"), rate_hz)
    )
    kind, answer = function.invoke(
        posted("/v1/audio/transcriptions", audio, model="whisper-1", response_format="text")
    )
    assert (kind, answer["statusCode"], answer["body"].strip()) == ("response", 200, "abc def")


def _mp4(samples: np.ndarray, rate_hz: int) -> bytes:
    """mp4 needs a file that can be wound back."""
    return coded(samples, "mp4", "aac", rate_hz)


def test_rest_api_lists_models(function: LambdaService) -> None:
    made = event("rest_api")
    made["multiValueHeaders"]["Authorization"] = [f"Bearer {SECRET}"]
    kind, answer = function.invoke(made)
    assert (kind, answer["statusCode"]) == ("response", 200)
    assert "tiny" in answer["body"]
    assert answer["multiValueHeaders"]["content-type"] == ["application/json"]


def test_a_key_is_asked_for(function: LambdaService) -> None:
    made = posted("/transcribe", wav(sing("abc")))
    del made["headers"]["authorization"]
    _, answer = function.invoke(made)
    assert answer["statusCode"] == 401
    assert answer["headers"]["www-authenticate"].startswith("Bearer")


def test_bad_audio_and_unknown_route(function: LambdaService) -> None:
    _, answer = function.invoke(posted("/transcribe", b"this is no audio"))
    assert answer["statusCode"] == 400
    assert json.loads(answer["body"])["error"]["code"] == "undecodable_audio"
    _, answer = function.invoke(posted("/nothing", b""))
    assert answer["statusCode"] == 404


def test_s3_event_leaves_a_transcript(function: LambdaService, storage: Bucket) -> None:
    storage.objects["recordings/incoming/two words (café).wav"] = wav(sing("abc def"))
    storage.fail_next = 1
    kind, answer = function.invoke(event("s3"))
    assert kind == "response", answer
    target = "transcripts/incoming/two words (café).wav.json"
    assert answer["objects"][0]["transcript"] == target
    stored = json.loads(storage.objects[f"recordings/{target}"])
    assert stored["text"] == "abc def"
    assert [word["word"] for word in stored["words"]] == ["abc", "def"]


def test_s3_recording_at_fault_gets_its_error(function: LambdaService, storage: Bucket) -> None:
    made = event("s3")
    made["Records"][0]["s3"]["object"]["key"] = "incoming/bad.wav"
    large = copy.deepcopy(made["Records"][0])
    large["s3"]["object"] |= {"key": "incoming/large.wav", "size": 10**12}
    own = copy.deepcopy(made["Records"][0])
    own["s3"]["object"]["key"] = "transcripts/incoming/bad.wav.json"
    made["Records"] += [large, own]
    storage.objects["recordings/incoming/bad.wav"] = b"no audio at all"
    kind, answer = function.invoke(made)
    assert kind == "response"
    assert [entry["status"] for entry in answer["objects"]] == ["failed", "failed", "skipped"]
    stored = json.loads(storage.objects["recordings/transcripts/incoming/bad.wav.json"])
    assert stored["error"]["code"] == "undecodable_audio"


def test_s3_missing_object_is_tried_again_by_lambda(function: LambdaService) -> None:
    made = event("s3")
    made["Records"][0]["s3"]["object"]["key"] = "incoming/gone.wav"
    kind, answer = function.invoke(made)
    assert kind == "error"
    assert answer["errorType"] == "ClientError"


def test_s3_recordings_behind_one_that_fails_are_transcribed(
    function: LambdaService, storage: Bucket
) -> None:
    made = event("s3")
    keys = ["incoming/gone.wav", "incoming/there.wav", "incoming/gone-too.wav"]
    first = made["Records"][0]
    made["Records"] = [copy.deepcopy(first) for _ in keys]
    for record, key in zip(made["Records"], keys, strict=True):
        record["s3"]["object"]["key"] = key
    storage.objects["recordings/incoming/there.wav"] = wav(sing("abc def"))
    kind, answer = function.invoke(made)
    assert (kind, answer["errorType"]) == ("error", "ExceptionGroup")
    assert "2 of 3 recordings failed" in answer["errorMessage"]
    stored = json.loads(storage.objects["recordings/transcripts/incoming/there.wav.json"])
    assert stored["text"] == "abc def"


def test_a_folder_made_in_the_console_is_no_recording(function: LambdaService, storage: Bucket) -> None:
    made = event("s3")
    made["Records"][0]["s3"]["object"] |= {"key": "incoming/meetings/", "size": 0}
    storage.objects["recordings/incoming/meetings/"] = b""
    assert function.invoke(made) == (
        "response",
        {"objects": [{"key": "incoming/meetings/", "status": "skipped"}]},
    )
    assert "recordings/transcripts/incoming/meetings/.json" not in storage.objects


def test_a_large_object_comes_in_parts(function: LambdaService, storage: Bucket) -> None:
    """boto3 fetches what is over 8 MB in ranges, several at a time, into a file on disk."""
    made = event("s3")
    made["Records"][0]["s3"]["object"]["key"] = "incoming/long.wav"
    silence = np.zeros(300 * SAMPLE_RATE_HZ, np.float32)
    storage.objects["recordings/incoming/long.wav"] = wav(np.concatenate([sing("abc def"), silence]))
    assert len(storage.objects["recordings/incoming/long.wav"]) > 8 * 2**20
    kind, answer = function.invoke(made)
    assert (kind, answer["objects"][0]["status"]) == ("response", "transcribed")
    stored = json.loads(storage.objects["recordings/transcripts/incoming/long.wav.json"])
    assert stored["text"].startswith("abc def")


def test_other_events_are_refused_and_the_function_lives_on(function: LambdaService) -> None:
    kind, answer = function.invoke({"source": "aws.events"})
    assert (kind, answer["errorType"]) == ("error", "ValueError")
    kind, answer = function.invoke({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "recordings"})
    assert (kind, answer) == ("response", {"objects": []})


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"ASR_API_KEYS": ""}, "SettingsError", "ASR_API_KEYS"),
        ({"ASR_MODELS": "absent"}, "NotReadyError", "absent"),
        ({"ASR_OUTPUT_PREFIX": ""}, "SettingsError", "ASR_OUTPUT_PREFIX"),
    ],
)
def test_a_bad_start_is_reported(models: Path, changes: dict[str, str], kind: str, message: str) -> None:
    with lambda_service() as service:
        process = subprocess.run(
            [sys.executable, "-m", "serverless.bootstrap"],
            env=environment(models, service.address, "http://127.0.0.1:9") | changes,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == 1
        _, where, body = service.answers.get(timeout=5)
    assert (where, body["errorType"]) == ("error", kind)
    assert message in body["errorMessage"]


class Cloud(yaml.SafeLoader):
    """Reads CloudFormation's short forms (`!Ref x`) as plain values."""


Cloud.add_multi_constructor(
    "!",
    lambda loader, _, node: (
        loader.construct_scalar(node)
        if isinstance(node, yaml.ScalarNode)
        else loader.construct_sequence(node)
    ),
)


def of_template(
    monkeypatch: pytest.MonkeyPatch, name: str, *, bound: str = "Default"
) -> tuple[dict[str, Any], dict[str, Any], Settings]:
    """The template, one function's properties and its settings; parameters have their `bound`."""
    template = yaml.load((ROOT / "serverless" / "template.yaml").read_text(), Cloud)
    parameters = template["Parameters"]
    properties = template["Globals"]["Function"] | template["Resources"][name]["Properties"]
    for variable in [variable for variable in os.environ if variable.startswith("ASR_")]:
        monkeypatch.delenv(variable)
    for variable, value in properties["Environment"]["Variables"].items():
        if "resolve:" in value:
            monkeypatch.setenv(variable, f"tester:{SECRET}")
        else:
            monkeypatch.setenv(variable, str(parameters[value][bound]) if value in parameters else value)
    settings = load_settings(env_file=None, host=os.environ.get("ASR_HOST", "0.0.0.0"))
    return template, properties, settings


@pytest.mark.parametrize("name", ["TranscribeFunction", "RecordingsFunction"])
def test_the_templates_functions_can_start(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _, properties, settings = of_template(monkeypatch, name)
    disk_bytes = properties["EphemeralStorage"]["Size"] * 2**20
    assert settings.max_upload_bytes < disk_bytes


@pytest.mark.parametrize("bound", ["MinValue", "Default", "MaxValue"])
def test_a_recording_has_the_time_that_the_template_is_given(
    monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """And a minute before Lambda ends the function: to be fetched, and to fail with an error of ours."""
    template, properties, settings = of_template(monkeypatch, "RecordingsFunction", bound=bound)
    assert settings.request_timeout_s == template["Parameters"]["TimeoutSeconds"][bound]
    assert settings.request_timeout_s + 60 <= properties["Timeout"]


def test_template_passes_cfn_lint() -> None:
    program = shutil.which("cfn-lint") or ROOT / ".venv-infra" / "bin" / "cfn-lint"
    if not Path(program).is_file():
        pytest.skip("cfn-lint is not installed")
    answer = subprocess.run(
        [str(program), str(ROOT / "serverless" / "template.yaml")],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert answer.returncode == 0, answer.stdout
