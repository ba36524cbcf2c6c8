"""Runbooks: one per alert, commands that exist, queries and patterns that find what they are for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.monitoring.files import ROOT, RUNBOOKS, alerts, dashboards, runbook_queries


def test_there_is_no_runbook_without_an_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == {alert["alert"] for alert in alerts()}


@pytest.mark.parametrize("path", sorted(RUNBOOKS.glob("*.md")), ids=lambda path: path.stem)
def test_the_commands_of_a_runbook_exist(path: Path) -> None:
    """No Compose file is in the root and the project is `asr`, so only docker/compose.sh finds the stack."""
    text = path.read_text(encoding="utf-8")
    assert "docker compose" not in text
    assert "docker-compose" not in text
    assert "logs deploy/" not in text, "reads one pod of three; select by label"
    for subcommand in re.findall(r"docker/compose\.sh (\S+)", text):
        # `up` would take the default image, not the deployed one; `restart` takes all replicas away at once.
        assert subcommand.strip("`).;,") in ("logs", "ps"), subcommand
    targets = re.findall(r"`make ([a-z0-9-]+)", text)
    known = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(targets) <= set(known)
    manifests = (ROOT / "k8s/base/api/deployment.yaml").read_text(encoding="utf-8")
    for line in text.splitlines():
        for label in re.findall(r"logs -l ([\w./-]+=[\w-]+)", line):
            assert label.replace("=", ": ") in manifests, label
            assert "--prefix" in line
            assert "--tail=" in line, "with a selector kubectl shows ten lines"
            assert "--ignore-errors" in line, "one pod that has not started yet would hide all the others"


def test_the_queries_of_runbooks_hide_nothing() -> None:
    for query in runbook_queries():
        # The right side loses every series whose labels the left side has, whatever it measures.
        assert " or " not in query.expression.replace("\n", " "), query
        # A model that nobody uses has the ratio NaN, and NaN is then the mean of all.
        assert not re.search(r"\b(avg|sum)( by \([^)]*\))? ?\(\w+:\w+:ratio", query.expression), query
        # Compose and the chart name all jobs but ours differently.
        assert set(re.findall(r'job="([^"]+)"', query.expression)) <= {"asr-api", "asr-gateway"}, query


def test_more_replicas_are_asked_of_the_autoscaler() -> None:
    """It takes back what `kubectl scale` does, except from zero."""
    for path in RUNBOOKS.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        if path.stem != "AsrServiceDown":
            assert "kubectl -n asr-system scale" not in text, path
        for kind, name in re.findall(r"(?:patch|describe|get) (hpa|service|deployment) ([a-z-]+)", text):
            assert (kind, name) in (("hpa", "asr-api"), ("service", "asr-api")), path


def test_where_more_replicas_are_asked_for_there_is_room_for_them() -> None:
    """The limit of the pool that Terraform makes, which its next apply would take back."""
    assert '"${var.cluster_name}-default"' in (ROOT / "terraform/main.tf").read_text(encoding="utf-8")
    for path in RUNBOOKS.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        if '"minReplicas": N}' in text:
            assert "doctl kubernetes cluster node-pool update asr asr-default" in text, path
            assert "`max_nodes` in `terraform.tfvars`" in text, path
        if "rollout undo" in text and path.stem != "AsrReplicaMissing":
            assert "(AsrReplicaMissing.md#mitigation)" in text, path


def test_what_failed_inside_is_found_in_the_log() -> None:
    line = '{"model": "m", "error": "RuntimeError()", "event": "batch failed", "level": "error"}'
    for name in ("AsrAvailabilityBurnFast", "AsrAvailabilityBurnSlow"):
        text = (RUNBOOKS / f"{name}.md").read_text(encoding="utf-8")
        patterns = re.findall(r"grep -E '([^']+)'", text)
        assert len(patterns) == 2
        assert all(re.search(pattern, line) for pattern in patterns)


def test_why_a_model_is_refused_is_found_among_the_requests_for_others() -> None:
    refused = '{"problem": "bundle \'m\': blank_id = 9", "event": "model_refused", "level": "error"}'
    request = '{"method": "POST", "outcome": "ok", "model": "other", "event": "request", "level": "info"}'
    patterns = re.findall(r"grep -i?E '([^']+)'", (RUNBOOKS / "AsrModelNotLoaded.md").read_text())
    assert len(patterns) == 3
    for pattern in patterns:
        assert re.search(pattern, refused)
        assert not re.search(pattern, request)


def test_the_dashboards_and_panels_that_are_named_exist() -> None:
    known = {title for board in dashboards().values() for title in (board["title"], *titles(board))}
    for path in [*RUNBOOKS.glob("*.md"), ROOT / "docs" / "observability.md"]:
        named = re.findall(r"(?<!\*)\*([A-Z][^*\n]+)\*(?!\*)", path.read_text(encoding="utf-8"))
        assert set(named) <= known, path


def titles(board: dict[str, Any]) -> list[str]:
    return [panel["title"] for panel in board["panels"]]
