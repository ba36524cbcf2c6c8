"""Workflows and Jenkinsfile: pinned actions, least rights, time limits, and nothing but make targets."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.render import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
JENKINSFILE = (ROOT / "Jenkinsfile").read_text()


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    names = re.findall(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    return {name for line in names for name in line.split()}


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def test_there_is_one_workflow_per_purpose() -> None:
    assert [path.stem for path in WORKFLOWS] == ["ci", "endurance", "images", "infra", "release"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit(path: Path) -> None:
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert uses
    for line in uses:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_an_action_has_one_commit_everywhere() -> None:
    seen: dict[str, str] = {}
    for path in WORKFLOWS:
        for name, commit in re.findall(r"uses: ([\w./-]+)@([0-9a-f]{40})", path.read_text()):
            assert seen.setdefault(name, commit) == commit


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_rights_time_and_concurrency(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {}
    assert "concurrency" in workflow
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 90, name
        assert "contents" in job["permissions"], name


def test_only_jobs_that_publish_may_write() -> None:
    writers = {
        (path.stem, name)
        for path in WORKFLOWS
        for name, job in load(path)["jobs"].items()
        if "write" in job["permissions"].values()
    }
    assert writers == {("images", "push"), ("release", "publish")}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_only_call_make(path: Path) -> None:
    commands = [step["run"] for job in load(path)["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "make", command
        targets = [word for word in words[1:] if "=" not in word]
        assert set(targets) <= make_targets(), command


def matches(path: str, patterns: list[str]) -> bool:
    """As GitHub reads its filters: ** is any text, * any without a slash."""
    forms = (re.escape(each).replace(r"\*\*", ".*").replace(r"\*", "[^/]*") for each in patterns)
    return any(re.fullmatch(form, path) for form in forms)


@pytest.mark.parametrize("event", ["push", "pull_request"])
def test_what_is_checked_is_checked_when_it_changes(event: str) -> None:
    lint = (ROOT / "tests/infra/lint.sh").read_text()
    wanted = [name for line in re.findall(r"< <\(tracked (.*)\)", lint) for name in shlex.split(line)]
    command = ["git", "ls-files", "--", *wanted, ".hadolint.yaml", ".checkov.yaml"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(files) > 60
    workflow: dict[object, Any] = yaml.safe_load((ROOT / ".github/workflows/infra.yml").read_text())
    patterns = workflow[True][event]["paths"]  # YAML reads the key `on` as true
    assert [path for path in files if not matches(path, patterns)] == []


def test_jenkins_only_calls_make() -> None:
    commands = re.findall(r"sh '([^']*)'", JENKINSFILE)
    assert len(commands) > 10
    for command in commands:
        words = shlex.split(command.removesuffix(" || true"))
        assert words[0] == "make", command
        assert {word for word in words[1:] if "=" not in word} <= make_targets(), command


def test_jenkins_rolls_back_each_deployment_and_bounds_each_stage() -> None:
    assert "make rollback-compose" in JENKINSFILE
    assert "make rollback-k8s" in JENKINSFILE
    top_level = re.findall(r"^    stage\('([^']+)'\)", JENKINSFILE, flags=re.MULTILINE)
    assert top_level[0] == "Checkout"
    blocks = re.split(r"^    stage\(", JENKINSFILE, flags=re.MULTILINE)[1:]
    for name, block in zip(top_level, blocks, strict=True):
        assert "timeout(time:" in block, name


def jenkins_stages() -> dict[str, str]:
    """Text of each top-level stage by its name."""
    found = re.findall(
        r"^    stage\('([^']+)'\)(.*?)(?=^    stage\(|\Z)", JENKINSFILE, re.DOTALL | re.MULTILINE
    )
    return dict(found)


def limit_s(text: str) -> int:
    """The first time limit in a part of the Jenkinsfile."""
    match = re.search(r"timeout\(time: (\d+), unit: '(MINUTES|HOURS)'\)", text)
    assert match is not None
    return int(match[1]) * {"MINUTES": 60, "HOURS": 3600}[match[2]]


def default_s(file: str, name: str) -> int:
    """A default number of seconds in a script."""
    match = re.search(rf"\b{name}\D{{1,40}}?(\d+)\b", (ROOT / file).read_text())
    assert match is not None
    return int(match[1])


def test_a_deployment_that_runs_out_of_time_or_is_aborted_is_rolled_back_too() -> None:
    """Jenkins calls both "aborted", for which `failure` does not run."""
    for name, stage in jenkins_stages().items():
        if "make deploy-" in stage or "make rollback-" in stage:
            post = stage.partition("post {")[2]
            assert re.match(r"(\s*//.*\n)*\s*unsuccessful \{[^}]*make (rollback|recover)-", post), name


def test_jenkins_gives_a_deployment_and_its_rollback_the_time_that_the_scripts_wait() -> None:
    stages = jenkins_stages()
    smoke_s = 2 * 120  # the service and the page
    setup_s = 3 * default_s("k8s/setup.sh", "timeout_s")  # two rollouts and the load balancer
    rollback_s = 2 * default_s("k8s/rollback.sh", "timeout_s")
    assert limit_s(stages["Deploy to Kubernetes"]) > setup_s + smoke_s + rollback_s
    charts = re.findall(r"^ *chart ", (ROOT / "k8s/monitoring-setup.sh").read_text(), flags=re.MULTILINE)
    assert limit_s(stages["Monitoring"]) > len(charts) * default_s("k8s/monitoring-setup.sh", "timeout_s")
    stop_grace_s, replicas = 105, 3
    roll_s = replicas * (stop_grace_s + default_s("docker/deploy.sh", "HEALTHY_TIMEOUT_S"))
    assert limit_s(stages["Deploy to Compose"]) > 2 * roll_s
    assert limit_s(stages["Smoke test of Compose"]) > smoke_s + roll_s
    assert limit_s(JENKINSFILE) > sum(limit_s(stage) for stage in stages.values()), "it would end a rollback"


def test_jenkins_builds_nothing_for_a_cluster_that_it_will_not_push_for() -> None:
    """Without a registry nothing is pushed, and the pods would wait for their images until the timeout."""
    assert "when { expression { params.REGISTRY != '' } }" in jenkins_stages()["Push"]
    before = jenkins_stages()["Checkout"].partition("checkout(scm)")[0]
    refusal = (
        r"if \(params\.DEPLOY == 'kubernetes' && params\.REGISTRY == ''\) \{\s+error '.*\bREGISTRY\b.*'\s+\}"
    )
    assert re.search(refusal, before)


def test_jenkins_keeps_what_is_deployed_and_its_settings_on_the_agent() -> None:
    """JENKINS_HOME is a folder of the controller, and cleanWs empties the workspace."""
    for name in ("DEPLOY_STATE", "ENV_FILE"):
        path = re.search(rf'{name} = "(.*)"', JENKINSFILE)
        assert path is not None
        assert path[1].startswith("${env.HOME}/")


def test_only_a_release_makes_a_tag_of_the_version() -> None:
    """Kubernetes rolls nothing, and nodes pull nothing, while an image keeps its name."""
    assert load(ROOT / ".github/workflows/images.yml")["env"]["VERSION"] == "${{ github.sha }}"
    assert "VERSION" not in load(ROOT / ".github/workflows/release.yml")["env"]
    assert "env.VERSION = checkout(scm).GIT_COMMIT" in jenkins_stages()["Checkout"]
    shown = dry_make("deploy-k8s", REGISTRY="r.example/asr", VERSION="a1b2c3", KUBECONFIG="/tmp/a b")
    assert "--tag a1b2c3 " in shown
    assert "--kubeconfig '/tmp/a b'" in shown


def dry_make(target: str, **environment: str) -> str:
    """What make would run."""
    done = subprocess.run(
        ["make", "--dry-run", target],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_a_repository_with_capitals_has_a_registry_without() -> None:
    assert "docker/build.sh api r.example/acme/asr/asr-api" in dry_make(
        "images", REGISTRY="r.example/Acme/ASR"
    )
    assert "docker/sign.sh r.example/acme" in dry_make("sign", REGISTRY="r.example/Acme")


@pytest.mark.parametrize(
    ("status", "retry", "again", "passes"),
    [(1, "1", True, True), (3, "1", False, False), (1, "0", False, False)],
)
def test_failed_tests_are_tried_again_only_after_a_whole_run(
    tmp_path: Path, status: int, retry: str, again: bool, passes: bool
) -> None:
    """pytest ends with 1 where tests failed, with another status where it broke off (workers that died)."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/bash\necho "$*" >>{tmp_path}/calls\n'
        f'case "$*" in *--last-failed*) ;; *pytest*) exit {status} ;; esac\n'
    )
    python.chmod(0o755)
    for stamp in (".packages", ".run", ".training", ".dev"):
        (tmp_path / stamp).touch()
    done = subprocess.run(
        ["make", "test", f"VENV={tmp_path}", f"RETRY={retry}"], cwd=ROOT, capture_output=True, check=False
    )
    assert ("--last-failed" in (tmp_path / "calls").read_text()) == again
    assert (done.returncode == 0) == passes


def test_ci_installs_what_it_can_where_a_package_is_unknown(tmp_path: Path) -> None:
    """apt installs nothing of a list with an unknown name; Ubuntu, which the runners are, has no chromium."""
    tools = {
        "dpkg": "exit 1",
        "apt-get": f'case " $* " in *" chromium "*) exit 100 ;; *) echo "$*" >>{tmp_path}/calls ;; esac',
        "sudo": 'exec "$@"',
        "make": "exit 0",
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [ROOT / ".ci/run"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "could not install: chromium" in done.stderr
    calls = (tmp_path / "calls").read_text()
    for package in ("python3-venv", "prometheus", "prometheus-alertmanager", "espeak-ng", "ffmpeg", "gcc"):
        assert f" {package}\n" in calls


def test_only_a_failed_smoke_test_rolls_a_compose_deployment_back() -> None:
    """A deployment that fails goes back by itself; a rollback on top of that would go one version further."""
    stages = jenkins_stages()
    with_rollback = [name for name, block in stages.items() if "make rollback-compose" in block]
    assert with_rollback == ["Smoke test of Compose"]
    assert "make deploy-compose" not in stages["Smoke test of Compose"]


def test_the_matrix_covers_the_supported_pythons() -> None:
    assert load(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == [
        "3.11",
        "3.12",
        "3.13",
    ]
