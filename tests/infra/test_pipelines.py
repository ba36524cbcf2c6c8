"""Workflows and Jenkinsfile: pinned actions, least rights, time limits, and nothing but make targets."""

from __future__ import annotations

import re
import shlex
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


def test_only_a_failed_smoke_test_rolls_a_compose_deployment_back() -> None:
    """A deployment that fails goes back by itself; a rollback on top of that would go one version further."""
    stages = dict(
        re.findall(r"^    stage\('([^']+)'\)(.*?)(?=^    stage\(|\Z)", JENKINSFILE, re.DOTALL | re.MULTILINE)
    )
    with_rollback = [name for name, block in stages.items() if "make rollback-compose" in block]
    assert with_rollback == ["Smoke test of Compose"]
    assert "make deploy-compose" not in stages["Smoke test of Compose"]


def test_the_matrix_covers_the_supported_pythons() -> None:
    assert load(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == [
        "3.11",
        "3.12",
        "3.13",
    ]
