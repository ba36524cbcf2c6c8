"""The proofs say what they need where they cannot run, and the load client counts what it should."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.e2e_docker.cluster import for_old_api
from tests.e2e_docker.load import MAX_RETRIES, Tally, transcribe
from tests.infra.render import ROOT


@pytest.mark.parametrize("proof", ["compose_e2e", "kube_e2e", "sizing"])
def test_without_docker_a_proof_skips_and_says_why(proof: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.e2e_docker.{proof}"],
        cwd=ROOT, env={**os.environ, "DOCKER_HOST": "unix:///nonexistent.sock", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "SKIPPED" in done.stdout
    assert "ocker" in done.stdout


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A client whose server answers as the URL's path asks: a list of statuses, one per attempt."""
    attempts: dict[str, int] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        key = str(request.url)
        script = request.url.host.split(".")[0].split("-")[1:]
        step = script[min(attempts.get(key, 0), len(script) - 1)]
        attempts[key] = attempts.get(key, 0) + 1
        if step == "reset":
            raise httpx.ReadError("connection reset", request=request)
        return httpx.Response(int(step), json={"text": "hello"}, headers={"Retry-After": "0"})

    async with httpx.AsyncClient(
        transport=httpx.MockTransport(answer), base_url="http://placeholder"
    ) as made:
        yield made


@pytest.mark.parametrize(
    ("script", "text", "retried", "failures"),
    [
        ("s-200", "hello", 0, 0),
        ("s-503-200", "hello", 1, 0),
        ("s-429-429-200", "hello", 2, 0),
        ("s-503-503-503", None, MAX_RETRIES + 1, 1),
        ("s-400", None, 0, 1),
    ],
)
async def test_the_load_client_retries_like_an_http_client(
    client: httpx.AsyncClient, script: str, text: str | None, retried: int, failures: int
) -> None:
    client.base_url = httpx.URL(f"http://{script}.test")
    tally = Tally()
    assert await transcribe(client, "clip.wav", b"RIFF", tally) == text
    assert sum(tally.retried.values()) == retried
    assert len(tally.failures) == failures


async def test_a_reset_connection_is_retried(client: httpx.AsyncClient) -> None:
    client.base_url = httpx.URL("http://s-reset-200.test")
    tally = Tally()
    assert await transcribe(client, "clip.wav", b"RIFF", tally) == "hello"
    assert tally.retried == {"ReadError": 1}


def test_only_two_api_versions_and_the_requests_are_rewritten_for_the_old_node() -> None:
    before = (
        "apiVersion: autoscaling/v2\nkind: HorizontalPodAutoscaler\nmetadata:\n  name: asr-api\n"
        "---\napiVersion: policy/v1\nkind: PodDisruptionBudget\n---\napiVersion: apps/v1\nkind: Deployment\n"
        'resources:\n  limits:\n    cpu: "1"\n  requests:\n    cpu: 600m\n'
    )
    after = for_old_api(before)
    changed = [
        (old, new) for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new
    ]
    assert changed == [
        ("apiVersion: autoscaling/v2", "apiVersion: autoscaling/v2beta2"),
        ("apiVersion: policy/v1", "apiVersion: policy/v1beta1"),
        ("    cpu: 600m", "    cpu: 50m"),
    ]
