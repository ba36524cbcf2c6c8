"""The Compose files as data: pinned images, no default passwords, nothing published to the world."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from api.server import _LAST_SCRAPE_WAIT_S
from api.settings import Settings
from loadtest.processes import free_port
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
        address = re.sub(r"^\$\{ASR_(?:UI_)?PUBLISH_ADDRESS:-([\d.]+)\}", r"\1", str(port))
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


def example_settings() -> dict[str, str]:
    """Every setting of .env.example with its default."""
    return dict(re.findall(r"^#(ASR_\w+)=(.*)$", (ROOT / ".env.example").read_text(), flags=re.MULTILINE))


# Where the container listens and writes, and whom it believes, is not the machine's affair.
CONTAINERS_OWN = {
    "ASR_HOST", "ASR_PORT", "ASR_MODELS_DIR", "ASR_SPOOL_DIR", "ASR_FORWARDED_ALLOW_IPS",
}  # fmt: skip


def test_every_setting_but_the_containers_own_reaches_the_container() -> None:
    environment = services()["api"]["environment"]
    for name in example_settings():
        if name in CONTAINERS_OWN:
            assert "$" not in str(environment[name]), f"{name} of a .env is about another place"
        else:
            assert str(environment.get(name, "")).startswith(f"${{{name}:-"), f"{name} of a .env is ignored"


def without_settings() -> dict[str, str]:
    """The environment without what a person or Jenkins has set for the stack."""
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("ASR_", "COMPOSE_")) and key not in ("DEPLOY_STATE", "ENV_FILE")
    }


def compose(env: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """docker/compose.sh with this .env."""
    file = tmp_path / "env"
    file.write_text(env)
    return subprocess.run(
        [ROOT / "docker/compose.sh", "--part", "base,api,ui", *arguments],
        env={**without_settings(), "ENV_FILE": str(file)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_compose_itself_puts_the_settings_into_the_container(tmp_path: Path) -> None:
    settings = {name: value for name, value in example_settings().items() if name not in CONTAINERS_OWN}
    given = {name: value or "given" for name, value in settings.items()} | {
        "ASR_REQUEST_TIMEOUT_S": "240", "ASR_DRAIN_TIMEOUT_S": "99.5", "ASR_LOG_TEXT": "true",
    }  # fmt: skip
    others = "ASR_HOST=127.0.0.1\nASR_MODELS_DIR=/home/me/models\n"
    done = compose(others + "".join(f"{k}={v}\n" for k, v in given.items()), tmp_path, "config")
    if done.returncode != 0 and "needs Docker Compose" in done.stderr:
        pytest.skip("Docker Compose is not installed")
    assert done.returncode == 0, done.stderr
    api = yaml.safe_load(done.stdout)["services"]["api"]
    assert {name: str(api["environment"][name]) for name in given} == given
    assert api["environment"]["ASR_HOST"] == "0.0.0.0"
    assert api["environment"]["ASR_MODELS_DIR"] == "/app/models"
    assert stop_bound_s(given) < seconds(api["stop_grace_period"])


@pytest.mark.parametrize("name", ["api", "ui"])
def test_the_sampler_of_an_env_file_reaches_the_container(name: str) -> None:
    """A trace is sampled where it begins, in the page or in the service."""
    environment = services()[name]["environment"]
    names = ("OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG")
    defaults = dict(
        re.fullmatch(rf"\$\{{({variable}):-(.+)\}}", environment[variable]).groups()  # type: ignore[union-attr]
        for variable in names
    )
    # What it would take without them, and without a word in its log.
    read = "from opentelemetry.sdk.trace.sampling import _get_from_env_or_default as own; "
    read += "print(own().get_description())"
    said = [
        subprocess.run(
            [sys.executable, "-c", read],
            env={**given, "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )
        for given in ({}, defaults)
    ]
    assert said[0].stdout == said[1].stdout != ""
    assert said[1].stderr == ""


def seconds(period: str) -> float:
    """Of a Compose duration such as 1m45s."""
    minutes, rest = re.fullmatch(r"(?:(\d+)m)?(?:([\d.]+)s)?", period).groups()  # type: ignore[union-attr]
    return 60 * float(minutes or 0) + float(rest or 0)


def stop_bound_s(environment: dict[str, Any]) -> float:
    """What a stop may take: the grace, the last scrape, the draining."""
    values = {key: re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", str(value)) for key, value in environment.items()}
    return float(values["ASR_DRAIN_GRACE_S"]) + _LAST_SCRAPE_WAIT_S + float(values["ASR_DRAIN_TIMEOUT_S"])


def test_nothing_stops_a_container_before_it_is_done() -> None:
    api = services()["api"]
    grace = re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", api["stop_grace_period"])
    assert stop_bound_s(api["environment"]) < seconds(grace)
    # Whoever stops a container leaves the time to what the Compose file gave it.
    for path in [ROOT / "Makefile", *(ROOT / "docker").glob("*.sh"), *(ROOT / "docs").rglob("*.md")]:
        for line in path.read_text().splitlines():
            if re.search(r"\b(stop|restart|down)\b", line) and re.search(r"docker|compose", line):
                assert not re.search(r"\s(--time|--timeout|-t)[ =]", line), f"{path.name}: {line.strip()}"


@pytest.mark.parametrize(
    ("env", "wrong"),
    [
        ("", None),
        ("ASR_PUBLISH_ADDRESS=127.0.0.1\n", None),
        ("ASR_PUBLISH_ADDRESS=0.0.0.0\n", "ASR_API_KEYS"),
        ("ASR_PUBLISH_ADDRESS='0.0.0.0'\nASR_API_KEYS=\n", "ASR_API_KEYS"),
        ("ASR_UI_PUBLISH_ADDRESS=10.0.0.7\n", "ASR_API_KEYS"),
        ("ASR_PUBLISH_ADDRESS=0.0.0.0\nASR_ALLOW_ANONYMOUS=true\n", None),
        (
            "ASR_PUBLISH_ADDRESS=0.0.0.0\nASR_API_KEYS=me:0123456789abcdef\nASR_API_KEY=0123456789abcdef\n",
            None,
        ),
        ("ASR_ALLOW_ANONYMOUS=false\n", "ASR_API_KEYS"),
        ("ASR_REQUEST_TIMEOUT_S=600\n", "proxy_read_timeout"),
        ("ASR_MAX_UPLOAD_BYTES=250000000\n", None),
        ("ASR_MAX_UPLOAD_BYTES=300000000\n", "client_max_body_size"),
        ("ASR_MAX_BODY_BYTES=300000000\n", "client_max_body_size"),
    ],
)
def test_an_open_or_impossible_stack_is_not_started(env: str, wrong: str | None, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/docker"
    fake.write_text('#!/bin/bash\n[ "$2" = version ] || echo "anonymous=$ASR_ALLOW_ANONYMOUS"\n')
    fake.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
        done = compose(env, tmp_path, "up", "--detach")
        assert compose(env, tmp_path, "ps").returncode == 0, "what runs can always be looked at"
    if wrong is None:
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    else:
        assert done.returncode == 1
        assert wrong in done.stderr
        assert done.stdout == ""
    if env == "":
        assert done.stdout == "anonymous=true\n"


def test_keys_without_one_for_the_page_are_told(tmp_path: Path) -> None:
    (tmp_path / "docker").write_text("#!/bin/bash\n")
    (tmp_path / "docker").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        done = compose("ASR_API_KEYS=me:0123456789abcdef\n", tmp_path, "up")
    assert "ASR_API_KEY is not set" in done.stderr


def test_the_gateway_waits_longer_than_a_request_may_take() -> None:
    conf = (ROOT / "docker/nginx/nginx.conf").read_text()
    (read_timeout_s,) = re.findall(r"proxy_read_timeout (\d+)s;", conf)
    limit = re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", services()["api"]["environment"]["ASR_REQUEST_TIMEOUT_S"])
    assert float(read_timeout_s) > float(limit)
    (size,) = re.findall(r"client_max_body_size (\d+)m;", conf)
    assert int(size) << 20 > Settings.model_fields["max_body_bytes"].default


def test_prometheus_sees_the_gateway_and_callers_do_not_see_how() -> None:
    """Replicas that nobody reaches look well; only the gateway itself says that it is gone."""
    config = yaml.safe_load((ROOT / "monitoring/prometheus/prometheus.yml").read_text())
    (job,) = (each for each in config["scrape_configs"] if each["job_name"] == "asr-gateway")
    (target,) = job["static_configs"][0]["targets"]
    assert target == "gateway:8081"
    gateway, prometheus = services()["gateway"], services()["prometheus"]
    assert gateway["expose"] == ["8081"]
    assert all("8081" not in port for port in gateway["ports"])
    # A network of their own: on any other the gateway would reach what has no password, or Prometheus find
    # the replicas under two addresses each.
    assert set(gateway["networks"]) & set(prometheus["networks"]) == {"probe"}
    assert {name for name, each in services().items() if "probe" in each["networks"]} == {
        "gateway",
        "prometheus",
    }
    networks = yaml.safe_load((ROOT / "docker/compose.base.yml").read_text())["networks"]
    assert {network for each in services().values() for network in each["networks"]} == set(networks)


def test_the_gateway_says_on_one_port_only_that_it_is_there(tmp_path: Path) -> None:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed (Debian: nginx)")
    public, probe = free_port(), free_port()
    conf = (ROOT / "docker/nginx/nginx.conf").read_text()
    conf = conf.replace("listen 8080;", f"listen 127.0.0.1:{public};").replace("/tmp/", f"{tmp_path}/")
    conf = conf.replace("listen 8081;", f"listen 127.0.0.1:{probe};").replace(
        "worker_processes auto", "worker_processes 1"
    )
    (tmp_path / "nginx.conf").write_text(conf)
    command = ["nginx", "-e", "stderr", "-c", str(tmp_path / "nginx.conf"), "-g", "daemon off;"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        scraped = answer(f"http://127.0.0.1:{probe}/metrics")
        assert scraped.headers["content-type"] == "text/plain; version=0.0.4"
        families = list(text_string_to_metric_families(scraped.text))
        assert [(family.name, family.samples[0].value) for family in families] == [("asr_gateway_up", 1.0)]
        assert answer(f"http://127.0.0.1:{probe}/transcribe").status_code == 404
        assert answer(f"http://127.0.0.1:{public}/metrics").status_code == 404
        assert answer(f"http://127.0.0.1:{public}/gateway/health").text == "ok\n"
    finally:
        process.terminate()
        process.wait(10)


def answer(url: str) -> httpx.Response:
    """Of a server that has just been started."""
    for _ in range(100):
        try:
            return httpx.get(url)
        except httpx.ConnectError:
            time.sleep(0.1)
    raise AssertionError(f"{url} never answered")


def test_the_limits_are_compared_with_the_defaults_of_the_service() -> None:
    script = (ROOT / "docker/check_settings.sh").read_text()
    for field in ("max_upload_bytes", "max_body_bytes"):
        assert f"ASR_{field.upper()}:{Settings.model_fields[field].default}" in script
    page = services()["ui"]["environment"]["STREAMLIT_SERVER_MAX_UPLOAD_SIZE"]
    (size,) = re.findall(r"^\$\{STREAMLIT_SERVER_MAX_UPLOAD_SIZE:-(\d+)\}$", page)
    assert int(size) << 20 == Settings.model_fields["max_upload_bytes"].default


def test_another_nginx_conf_is_another_gateway(tmp_path: Path) -> None:
    """Compose replaces a container whose definition changed; the content of a mounted file is not in it."""
    assert services()["gateway"]["labels"] == {"asr.nginx-conf": "${ASR_NGINX_CONF_SUM:-}"}
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/docker").write_text('#!/bin/bash\necho "$ASR_NGINX_CONF_SUM"\n')
    (tmp_path / "bin/docker").chmod(0o755)
    environment = {**without_settings(), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    sums = []
    for line in ("", "", "# another line\n"):
        with (tmp_path / "docker/nginx/nginx.conf").open("a") as conf:
            conf.write(line)
        command = [tmp_path / "docker/compose.sh", "ps"]
        sums.append(
            subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        )
    assert sums[0] == sums[1] != sums[2]
    assert sums[0].strip()


@pytest.mark.parametrize(
    ("command", "password"), [("logs", "unused"), ("ps", "unused"), ("up", ""), ("run", "")]
)
def test_looking_at_the_stack_needs_no_password_and_starting_it_does(
    tmp_path: Path, command: str, password: str
) -> None:
    """The runbooks' commands, where Jenkins has deployed and no .env was ever written."""
    (tmp_path / "docker").write_text('#!/bin/bash\n[ "$2" = version ] || echo "<$GRAFANA_ADMIN_PASSWORD>"\n')
    (tmp_path / "docker").chmod(0o755)
    environment = without_settings() | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "ENV_FILE": "/nonexistent",
    }
    environment.pop("GRAFANA_ADMIN_PASSWORD", None)
    called = [ROOT / "docker/compose.sh", command, "api"]
    done = subprocess.run(called, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"<{password}>\n"


def test_what_containers_mount_outlives_the_checkout(tmp_path: Path) -> None:
    """Jenkins empties its workspace; Docker mounts the files again when the machine starts."""
    (tmp_path / "docker").write_text('#!/bin/bash\necho "$ASR_NGINX_CONF $ASR_MONITORING"\n')
    (tmp_path / "docker").chmod(0o755)
    checkout = tmp_path / "checkout"
    for folder in ("docker", "monitoring"):
        shutil.copytree(ROOT / folder, checkout / folder)
    environment = {
        **without_settings(), "PATH": f"{tmp_path}:{os.environ['PATH']}", "DEPLOY_STATE": "deployed",
        "ENV_FILE": "/nonexistent",
    }  # fmt: skip

    def mounted() -> list[Path]:
        command = [checkout / "docker/compose.sh", "ps"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return [Path(word) for word in done.stdout.splitlines()[-1].split()]

    before = mounted()
    assert mounted() == before
    for name in ("docker/nginx/nginx.conf", "monitoring/prometheus/prometheus.yml"):
        with (checkout / name).open("a") as file:
            file.write("# another line\n")
    after = mounted()
    assert all(path.parent == checkout / "deployed" for path in before + after)
    assert len({*before, *after}) == 4, "what runs keeps what it was started with"
    assert before[0].read_bytes() == (ROOT / "docker/nginx/nginx.conf").read_bytes()
    assert after[0].read_bytes() == (checkout / "docker/nginx/nginx.conf").read_bytes()
    for name in ("prometheus", "alertmanager", "grafana/provisioning", "grafana/dashboards", "otel"):
        assert (before[1] / name).is_dir()
    for name, service in services().items():
        for volume in service.get("volumes", []):
            assert not str(volume).startswith("."), f"{name} mounts {volume} of the checkout"


def test_every_mounted_file_exists() -> None:
    for name, service in services().items():
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", str(volume)).split(":")[0]
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
