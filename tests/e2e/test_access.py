"""Keys, rate limits, switches and CORS on live services."""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from loadtest.processes import ROOT, SERVE, LiveServer
from tests.e2e.live import environment, start
from tests.tiny_bundle import sing, wav

ALICE = "alice-secret-0123456789"
BOB = "bob-secret-0123456789"
AUDIO = {"file": ("a.wav", wav(sing("abc")))}


@pytest.fixture(scope="module")
def guarded(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    digest = hashlib.sha256(BOB.encode()).hexdigest()
    live = start(
        models_dir,
        tmp_path_factory.mktemp("guarded") / "log",
        api_keys=f"alice:{ALICE},bob:sha256={digest}",
        rate_limit_per_minute=120,
        cors_origins="https://app.example",
        docs_enabled="false",
        metrics_enabled="false",
        max_upload_bytes=100_000,
    )
    yield live
    live.kill()


@pytest.fixture
def http(guarded: LiveServer) -> Iterator[httpx.Client]:
    with guarded.client() as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("headers", [{}, bearer("wrong-key-0123456789"), {"authorization": f"Basic {ALICE}"}])
@pytest.mark.parametrize("path", ["/transcribe", "/transcribe/batch", "/v1/audio/transcriptions"])
def test_without_a_known_key_is_401(http: httpx.Client, path: str, headers: dict[str, str]) -> None:
    response = http.post(path, files=AUDIO, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.headers["x-request-id"]


def test_listings_need_a_key_too_and_probes_do_not(http: httpx.Client) -> None:
    assert http.get("/models").status_code == 401
    assert http.get("/v1/models").status_code == 401
    assert http.get("/v1/models", headers=bearer(ALICE)).status_code == 200
    for path in ("/health/live", "/health/ready", "/health/startup", "/"):
        assert http.get(path).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        bearer(ALICE),
        bearer(BOB),
        {"x-api-key": ALICE},
        {"authorization": "Basic for-a-proxy", "x-api-key": ALICE},
    ],
)
def test_known_keys_are_let_in(http: httpx.Client, headers: dict[str, str]) -> None:
    time.sleep(1.1)  # the rate limit below is shared
    assert http.post("/transcribe", files=AUDIO, headers=headers).json()["text"] == "abc"


def test_openai_client_gets_its_authentication_error(guarded: LiveServer) -> None:
    url = f"{guarded.url}/v1"
    wrong = openai.OpenAI(base_url=url, api_key="wrong-key-0123456789")
    with wrong as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with openai.OpenAI(base_url=url, api_key=ALICE) as client:
        assert {model.id for model in client.models.list()} == {"tiny", "whisper-1"}


def test_keys_never_reach_the_log(guarded: LiveServer, http: httpx.Client) -> None:
    http.get("/models", headers=bearer(ALICE), params={"key": ALICE})
    assert ALICE not in guarded.log
    assert BOB not in guarded.log


def test_the_log_names_the_key_that_called(guarded: LiveServer, http: httpx.Client) -> None:
    time.sleep(1.1)  # the rate limit below is shared
    known = http.post("/transcribe", files=AUDIO, headers=bearer(BOB)).headers["x-request-id"]
    unknown = http.post("/transcribe", files=AUDIO, headers=bearer(BOB[:-1])).headers["x-request-id"]
    callers = {line.get("request_id"): line.get("caller") for line in guarded.log_lines()}
    assert (callers[known], callers[unknown]) == ("bob", None)


def test_rate_limit_is_per_key_and_says_when_to_come_back(http: httpx.Client) -> None:
    statuses, refusal = [], None
    for _ in range(30):
        response = http.post("/transcribe", files=AUDIO, headers=bearer(ALICE))
        statuses.append(response.status_code)
        if response.status_code == 429:
            refusal = response
            break
    assert refusal is not None, statuses
    assert refusal.json()["error"]["code"] == "rate_limit_exceeded"
    assert http.post("/transcribe", files=AUDIO, headers=bearer(BOB)).status_code == 200
    time.sleep(int(refusal.headers["retry-after-ms"]) / 1000)
    assert http.post("/transcribe", files=AUDIO, headers=bearer(ALICE)).status_code == 200


def test_docs_and_metrics_have_their_switches(http: httpx.Client) -> None:
    for path in ("/docs", "/openapi.json", "/metrics"):
        assert http.get(path, headers=bearer(ALICE)).status_code == 404
    assert not {"docs", "openapi", "metrics"} & set(http.get("/").json()["links"])


def test_cors_answers_the_configured_origin_only(http: httpx.Client) -> None:
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = http.options("/transcribe", headers={"origin": "https://app.example", **preflight})
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    denied = http.options("/transcribe", headers={"origin": "https://evil.example", **preflight})
    assert "access-control-allow-origin" not in denied.headers


@pytest.mark.parametrize("names", ["x-api-key", "authorization, content-type, x-stainless-arch"])
def test_cors_lets_the_headers_of_browser_clients_through(http: httpx.Client, names: str) -> None:
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": names}
    response = http.options("/transcribe", headers={"origin": "https://app.example", **preflight})
    assert response.status_code == 200
    allowed = response.headers["access-control-allow-headers"].lower()
    assert all(name.strip() in allowed for name in names.split(","))


def test_size_limit_follows_the_setting(http: httpx.Client) -> None:
    time.sleep(1)
    response = http.post("/transcribe", files={"file": b"\0" * 200_000}, headers=bearer(BOB))
    assert response.status_code == 413
    assert "100000 bytes" in response.json()["error"]["message"]


def test_open_address_without_keys_refuses_to_start(models_dir: Path) -> None:
    result = subprocess.run(
        SERVE,
        env=environment(models_dir, host="0.0.0.0"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("asr: ASR_HOST=0.0.0.0")
    assert "ASR_ALLOW_ANONYMOUS=true" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_browser_may_read_what_says_whether_to_try_again(http: httpx.Client) -> None:
    response = http.post(
        "/transcribe",
        headers={"origin": "https://app.example", **bearer(ALICE)},
        files={"file": ("a.wav", b"no sound")},
    )
    assert response.status_code == 400
    readable = response.headers["access-control-expose-headers"].lower().replace(" ", "").split(",")
    assert {"x-should-retry", "retry-after", "x-request-id"} <= set(readable)
