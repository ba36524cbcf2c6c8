"""Rules, alerts, runbooks and dashboards as files: complete, consistent, accepted by the real tools."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.monitoring.files import (
    GRAFANA,
    PROMETHEUS,
    ROOT,
    RUNBOOKS,
    alerts,
    dashboards,
    load_yaml,
    panels,
    rules,
)

ALERTMANAGER = ROOT / "monitoring" / "alertmanager" / "alertmanager.yml"
SECTIONS = ("## Meaning", "## Impact", "## Diagnosis", "## Mitigation")


def run_tool(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed (Debian: prometheus, prometheus-alertmanager)")
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def every_panel() -> list[Any]:
    return [
        pytest.param(panel, id=f"{name}/{panel['title']}")
        for name, dashboard in dashboards().items()
        for panel in panels(dashboard)
    ]


@pytest.mark.telemetry
def test_promtool_accepts_the_configuration_and_every_rule() -> None:
    run_tool("promtool", "check", "config", PROMETHEUS / "prometheus.yml")
    files = [*(PROMETHEUS / "rules").glob("*.yml"), *(PROMETHEUS / "alerts").glob("*.yml")]
    run_tool("promtool", "check", "rules", "--lint=all", "--lint-fatal", *files)


@pytest.mark.telemetry
@pytest.mark.parametrize("path", sorted((PROMETHEUS / "tests").glob("*.yml")), ids=lambda path: path.stem)
def test_alerts_fire_at_their_thresholds_and_not_before(path: Path) -> None:
    run_tool("promtool", "test", "rules", path)


def test_every_alert_has_a_case_before_and_a_case_at_its_threshold() -> None:
    cases: dict[str, set[bool]] = {}
    for path in (PROMETHEUS / "tests").glob("*.yml"):
        for case in load_yaml(path)["tests"]:
            for check in case["promql_expr_test"]:
                name = case["name"].split()[0]
                assert f'"{name}"' in check["expr"], case["name"]
                cases.setdefault(name, set()).add(bool(check["exp_samples"]))
    assert cases == {alert["alert"]: {True, False} for alert in alerts()}


@pytest.mark.telemetry
def test_alertmanager_routes_by_severity() -> None:
    run_tool("amtool", "check-config", ALERTMANAGER)
    for severity, receiver in (("critical", "page"), ("warning", "ticket")):
        routed = run_tool(
            "amtool", "config", "routes", "test", f"--config.file={ALERTMANAGER}", f"severity={severity}"
        )
        assert routed.strip() == receiver


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_says_what_to_do(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    assert name.startswith("Asr")
    assert alert["for"]
    assert alert["labels"]["severity"] in ("critical", "warning")
    notes = alert["annotations"]
    assert notes["summary"]
    assert len(notes["description"]) > 40
    assert notes["runbook_url"] == f"docs/runbooks/{name}.md"
    text = (RUNBOOKS / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    positions = [text.find(section) for section in SECTIONS]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert "```promql" in text


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


def test_recording_rules_are_named_level_metric_operation() -> None:
    for rule in rules("rules"):
        level, metric, operation = rule["record"].split(":")
        assert level, rule
        assert metric.startswith("asr_"), rule
        assert operation, rule


@pytest.mark.parametrize("panel", every_panel())
def test_a_panel_has_a_unit_a_description_and_a_fixed_source(panel: dict[str, Any]) -> None:
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert len(panel["description"]) > 20
    assert panel["datasource"]["uid"] == "prometheus"
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "prometheus"
        assert "[5m]" not in target["expr"]
        for function in ("rate(", "increase("):
            if function in target["expr"]:
                assert "[$__rate_interval]" in target["expr"] or "[$__range]" in target["expr"]


def test_dashboards_have_fixed_uids_and_lead_to_each_other() -> None:
    assert {name: board["title"] for name, board in dashboards().items()} == {
        "asr-service": "ASR service",
        "asr-engine": "ASR engine",
        "asr-api": "API performance",
        "asr-nodes": "Nodes and containers",
    }
    for name, board in dashboards().items():
        assert board["uid"] == name
        others = {f"/d/{other}" for other in dashboards() if other != name}
        assert {link["url"] for link in board["links"]} == others
        identifiers = [panel["id"] for panel in board["panels"]]
        assert len(identifiers) == len(set(identifiers))


def test_panels_do_not_overlap() -> None:
    for name, board in dashboards().items():
        taken: dict[tuple[int, int], str] = {}
        for panel in board["panels"]:
            box = panel["gridPos"]
            assert box["x"] + box["w"] <= 24
            for x in range(box["x"], box["x"] + box["w"]):
                for y in range(box["y"], box["y"] + box["h"]):
                    assert (x, y) not in taken, (name, panel["title"], taken[x, y])
                    taken[x, y] = panel["title"]


def test_datasources_lead_from_metrics_to_traces_and_back() -> None:
    file = load_yaml(GRAFANA / "provisioning" / "datasources" / "datasources.yml")
    sources = {source["uid"]: source for source in file["datasources"]}
    assert {"prometheus", "jaeger"} <= set(sources)
    (exemplars,) = sources["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert (exemplars["name"], exemplars["datasourceUid"]) == ("trace_id", "jaeger")
    back = sources["jaeger"]["jsonData"]["tracesToMetrics"]
    assert back["datasourceUid"] == "prometheus"
    recorded = {rule["record"] for rule in rules("rules")}
    assert {query["query"] for query in back["queries"][1:]} <= recorded


def test_the_collector_uses_only_what_it_declares() -> None:
    config = load_yaml(ROOT / "monitoring" / "otel" / "collector.yml")
    assert set(config["service"]["extensions"]) <= set(config["extensions"])
    for pipeline in config["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= set(config[kind])
