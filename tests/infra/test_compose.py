"""The Compose files as data: pinned images, no default passwords, nothing published to the world."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.settings import Settings
from tests.infra.render import ROOT

FILES = sorted((ROOT / "docker").glob("compose.*.yml"))
OURS = {"asr-api", "asr-ui"}


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in FILES:
        found |= yaml.safe_load(path.read_text()).get("services", {})
    return found


def test_the_stack_is_whole() -> None:
    assert set(services()) == {
        "api", "gateway", "ui", "prometheus", "alertmanager", "grafana", "jaeger", "otel-collector",
        "node-exporter", "cadvisor",
    }  # fmt: skip
    included = yaml.safe_load((ROOT / "docker/compose.yml").read_text())["include"]
    assert sorted(included) == [path.name for path in FILES]


@pytest.mark.parametrize("name", sorted(services()))
def test_third_party_images_are_pinned_by_version_and_digest(name: str) -> None:
    image = re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", services()[name]["image"])
    if image.split(":")[0] in OURS:
        assert re.fullmatch(r"[a-z-]+:\d+\.\d+\.\d+", image)
    else:
        assert re.fullmatch(r"[a-z0-9./-]+:v?\d[\w.-]*@sha256:[0-9a-f]{64}", image), image


def test_the_base_image_is_pinned_in_one_place() -> None:
    pinned = re.findall(r"^BASE_IMAGE=(\S+)$", (ROOT / "docker/base.env").read_text(), flags=re.MULTILINE)
    assert len(pinned) == 1
    tag, digest = pinned[0].split("@")
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
    for path in (ROOT / "docker").glob("*.Dockerfile"):
        text = path.read_text()
        assert f"ARG BASE_IMAGE={tag}\n" in text
        assert set(re.findall(r"^FROM (\S+)", text, flags=re.MULTILINE)) <= {"${BASE_IMAGE}", "dependencies"}
        assert digest not in text


@pytest.mark.parametrize("name", sorted(services()))
def test_ports_are_published_on_this_machine_only(name: str) -> None:
    for port in services()[name].get("ports", []):
        address = re.sub(r"^\$\{ASR_PUBLISH_ADDRESS:-([\d.]+)\}", r"\1", str(port))
        assert address.startswith("127.0.0.1:")


def test_no_password_has_a_default() -> None:
    text = "".join(path.read_text() for path in FILES)
    assert "admin/admin" not in text
    passwords = re.findall(r"(\w*PASSWORD\w*): (.*)", text)
    assert passwords
    for _, value in passwords:
        assert re.match(r"\$\{\w+:\?", value), "a password must be asked for, not defaulted"


def test_the_service_gets_settings_that_it_knows() -> None:
    environment = services()["api"]["environment"]
    fields = {f"ASR_{name.upper()}" for name in Settings.model_fields}
    assert {key for key in environment if key.startswith("ASR_")} <= fields


def test_stopping_fits_into_the_grace_period() -> None:
    api = services()["api"]
    drain_s = float(api["environment"]["ASR_DRAIN_GRACE_S"]) + float(
        api["environment"]["ASR_DRAIN_TIMEOUT_S"]
    )
    assert drain_s < float(api["stop_grace_period"].removesuffix("s"))


def test_the_gateway_waits_longer_than_a_request_may_take() -> None:
    conf = (ROOT / "docker/nginx/nginx.conf").read_text()
    (read_timeout_s,) = re.findall(r"proxy_read_timeout (\d+)s;", conf)
    assert float(read_timeout_s) > float(services()["api"]["environment"]["ASR_REQUEST_TIMEOUT_S"])
    (size,) = re.findall(r"client_max_body_size (\d+)m;", conf)
    assert int(size) << 20 > Settings.model_fields["max_body_bytes"].default


def test_every_mounted_file_exists() -> None:
    for name, service in services().items():
        for volume in service.get("volumes", []):
            source = str(volume).split(":")[0]
            if source.startswith("."):
                assert (ROOT / "docker" / source).exists(), f"{name} mounts {source}"


def test_make_env_writes_secrets_once(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("GRAFANA_ADMIN_USER=someone\nGRAFANA_ADMIN_PASSWORD=\n")
    for _ in range(2):
        subprocess.run([ROOT / "docker/make_env.sh", file], check=True, capture_output=True)
        first = first_content(file)
    values = dict(line.split("=", 1) for line in first.splitlines())
    assert values["GRAFANA_ADMIN_USER"] == "someone", "what is set stays"
    assert len(values["GRAFANA_ADMIN_PASSWORD"]) >= 30
    assert first.count("GRAFANA_ADMIN_PASSWORD=") == 1
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    other = tmp_path / "other"
    subprocess.run([ROOT / "docker/make_env.sh", other], check=True, capture_output=True)
    assert values["GRAFANA_ADMIN_PASSWORD"] not in other.read_text()


def first_content(file: Path) -> str:
    return file.read_text()
