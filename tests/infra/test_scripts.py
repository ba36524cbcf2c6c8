"""The scripts without a cluster or Docker: help, dry runs, refusals. The real runs: make e2e and e2e-k8s."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.infra.render import ROOT

SCRIPTS = ("setup.sh", "rollback.sh", "monitoring-setup.sh", "teardown.sh")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="the scripts render with kubectl")


def run(script: str, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("DIGITALOCEAN_TOKEN", "KUBECONFIG")
    }
    environment["REVISIONS_FILE"] = "/nonexistent/revisions"  # of this machine's last deployment: not ours
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(
        [ROOT / "k8s" / script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0
    options = set(re.findall(r"^    (--[a-z-]+)\)", (ROOT / "k8s" / script).read_text(), flags=re.MULTILINE))
    options |= {"--help"}
    assert options <= set(re.findall(r"--[a-z-]+", done.stdout))


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_option_is_refused(script: str) -> None:
    done = run(script, "--frobnicate")
    assert done.returncode == 1
    assert "unknown option --frobnicate" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("value", ["10m", "0", "1.5", "-1"])
def test_a_timeout_is_whole_seconds(script: str, value: str) -> None:
    """With its "s" behind it kubectl and Helm would take 10m for ten milliseconds."""
    done = run(script, "--timeout", value, "--dry-run")
    assert done.returncode == 1
    assert f"--timeout needs whole seconds, not {value}" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_goes_on_without_any_of_the_tools(tmp_path: Path, script: str) -> None:
    usual = "bash dirname basename env sed cat grep awk tr head base64 mkdir mktemp rm realpath find"
    for tool in usual.split():
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    done = run(script, "--dry-run", path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "a dry run goes on without them" in done.stdout
    assert "command not found" not in done.stderr
    assert "[dry-run]" in done.stdout


def run_docker_script(tmp_path: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """With a docker that fails the test when it is asked anything."""
    (tmp_path / "docker").write_text("#!/bin/sh\necho docker was asked >&2\nexit 99\n")
    (tmp_path / "docker").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        [ROOT / "docker" / script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert "docker was asked" not in done.stderr
    return done


@pytest.mark.parametrize(("script", "option"), [("compose.sh", "--part"), ("pin_images.sh", "--check")])
def test_help_of_a_docker_script_asks_docker_nothing(tmp_path: Path, script: str, option: str) -> None:
    done = run_docker_script(tmp_path, script, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: docker/{script}")
    assert option in done.stdout


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (("compose.sh",), "no command"),
        (("compose.sh", "--frobnicate", "ps"), "unknown option --frobnicate"),
        (("compose.sh", "--part", "base,pages", "ps"), "there is no part pages"),
        (("pin_images.sh", "--chekc"), "unknown argument --chekc"),
    ],
)
def test_a_docker_script_refuses_what_it_does_not_know(
    tmp_path: Path, call: tuple[str, ...], told: str
) -> None:
    done = run_docker_script(tmp_path, *call)
    assert done.returncode == 2
    assert told in done.stderr


@needs_kubectl
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_shows_and_changes_nothing(script: str) -> None:
    done = run(script, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "[dry-run]" in done.stdout


@needs_kubectl
def test_setup_dry_run_names_every_step() -> None:
    out = run("setup.sh", "--dry-run", "--tag", "9.9.9", "--registry", "registry.example.org/asr").stdout
    steps = [
        "terraform -chdir=terraform init",
        "terraform -chdir=terraform apply",
        "write the revisions of asr-api asr-ui",
        "kind: Deployment",
        "rollout status deployment/asr-api",
    ]
    positions = [out.index(step) for step in steps]
    assert positions == sorted(positions)


@needs_kubectl
def test_monitoring_dry_run_installs_the_pinned_charts() -> None:
    versions = dict(
        re.findall(
            r"^(\w+)_VERSION=(\S+)$", (ROOT / "k8s/monitoring/versions.env").read_text(), flags=re.MULTILINE
        )
    )
    out = run("monitoring-setup.sh", "--dry-run").stdout
    assert len(versions) == 4
    for version in versions.values():
        assert f"--version {version}" in out
    assert "kind: PrometheusRule" in out
    assert "dashboard-" in out


def test_missing_tools_are_named_all_at_once(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "env", "sed", "cat"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    done = run("setup.sh", path=str(tmp_path))
    assert done.returncode == 1
    for tool in ("terraform", "doctl", "kubectl"):
        assert f"missing: {tool}" in done.stdout


def test_setup_refuses_an_unknown_overlay() -> None:
    done = run("setup.sh", "--overlay", "nowhere", "--dry-run")
    assert done.returncode == 1
    assert "there is no overlay nowhere" in done.stderr


@needs_kubectl
def test_monitoring_manifests_carry_every_rule_and_dashboard() -> None:
    done = subprocess.run([ROOT / "k8s/monitoring/render.sh"], capture_output=True, text=True, check=True)
    objects = list(yaml.safe_load_all(done.stdout))
    (rules,) = [item for item in objects if item["kind"] == "PrometheusRule"]
    expected = []
    for folder in ("rules", "alerts"):
        for path in sorted((ROOT / "monitoring/prometheus" / folder).glob("*.yml")):
            expected += yaml.safe_load(path.read_text())["groups"]
    assert rules["spec"]["groups"] == expected
    dashboards = {item["metadata"]["name"] for item in objects if item["kind"] == "ConfigMap"}
    files = {f"dashboard-{path.stem}" for path in (ROOT / "monitoring/grafana/dashboards").glob("*.json")}
    assert dashboards == files
    assert files
