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
    panel_queries,
    panels,
    rule_queries,
    rules,
    runbook_queries,
)

ALERTMANAGER = ROOT / "monitoring" / "alertmanager" / "alertmanager.yml"
COMPOSE = ROOT / "docker" / "compose.monitoring.yml"
CHART = ROOT / "k8s" / "monitoring" / "kube-prometheus-stack-values.yaml"
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
def test_alerts_fire_at_their_thresholds_and_not_before_and_rules_say_what_they_should(path: Path) -> None:
    run_tool("promtool", "test", "rules", path)


def test_every_alert_has_a_case_before_and_a_case_at_its_threshold() -> None:
    cases: dict[str, set[bool]] = {}
    for path in {*(PROMETHEUS / "tests").glob("*.yml")} - {PROMETHEUS / "tests" / "rules_test.yml"}:
        for case in load_yaml(path)["tests"]:
            for check in case["promql_expr_test"]:
                name = case["name"].split()[0]
                assert f'"{name}"' in check["expr"], case["name"]
                cases.setdefault(name, set()).add(bool(check["exp_samples"]))
    assert cases == {alert["alert"]: {True, False} for alert in alerts()}


@pytest.mark.telemetry
def test_alertmanager_routes_by_severity() -> None:
    run_tool("amtool", "check-config", ALERTMANAGER)
    receivers = {"critical": "page", "warning": "ticket", "none": "nobody", "": "ticket"}
    for severity, receiver in receivers.items():
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


def test_prometheus_remembers_as_long_as_a_rule_looks_back() -> None:
    windows = re.findall(r"\[(\d+)d\]", " ".join(query.expression for query in rule_queries()))
    longest = max(map(int, windows))
    (compose,) = re.findall(r"retention\.time=\$\{PROMETHEUS_RETENTION:-(\d+)d\}", COMPOSE.read_text())
    chart = load_yaml(CHART)["prometheus"]["prometheusSpec"]["retention"]
    assert longest == 30
    assert int(compose) >= longest
    assert int(chart.removesuffix("d")) >= longest


def test_what_pages_does_not_wait_for_rules_that_look_back_for_days() -> None:
    for group in load_yaml(PROMETHEUS / "rules" / "slo.yml")["groups"]:
        if "[30d]" in str(group):
            assert group["interval"] == "2m"
            assert len(group["rules"]) == 1


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


def test_traces_lead_back_to_metrics_in_kubernetes_too() -> None:
    file = load_yaml(GRAFANA / "provisioning" / "datasources" / "datasources.yml")
    (compose,) = [source for source in file["datasources"] if source["uid"] == "jaeger"]
    (chart,) = load_yaml(CHART)["grafana"]["additionalDataSources"]
    assert chart["uid"] == compose["uid"]
    assert chart["jsonData"] == compose["jsonData"]


def test_the_first_row_says_zero_or_no_traffic_instead_of_nothing() -> None:
    """0 of 0 requests is NaN, which the panels would show in red; a comparison drops it."""
    stats = [panel for panel in panels(dashboards()["asr-service"]) if panel["type"] == "stat"]
    assert len(stats) == 6
    for panel in stats:
        (target,) = panel["targets"]
        if "or vector(0)" not in target["expr"]:
            assert panel["fieldConfig"]["defaults"]["noValue"] == "no traffic"
            assert re.search(r">= 0|> 0|<= 1", target["expr"]), target["expr"]


def test_no_container_is_dropped_for_the_group_it_is_in() -> None:
    """Where Docker uses systemd's groups, containers are scopes among the machine's services."""
    jobs = {job["job_name"]: job for job in load_yaml(PROMETHEUS / "prometheus.yml")["scrape_configs"]}
    for rule in jobs["cadvisor"].get("metric_relabel_configs", []):
        assert not re.fullmatch(rule["regex"], "/system.slice/docker-899523c84faa.scope"), rule
    assert "--docker_only=true" in COMPOSE.read_text(encoding="utf-8")


def test_containers_are_told_apart_in_both_worlds() -> None:
    (flag,) = re.findall(r"--whitelisted_container_labels=(\S+)", COMPOSE.read_text())
    kept = {"container_label_" + re.sub(r"[^a-z]", "_", label) for label in flag.split(",")}
    for query in [*panel_queries(), *runbook_queries()]:
        for labels in re.findall(r"by \(pod, ([^)]*)\)", query.expression):
            used = {label for label in labels.split(", ") if label != "container"}
            assert len(used) == 2, query
            assert used <= kept, query


def test_the_limit_of_a_container_is_known_in_kubernetes_too() -> None:
    """kube-prometheus-stack drops cAdvisor's container_spec_* and keeps what kube-state-metrics says."""
    expressions = [query.expression for query in panel_queries() if "container_spec_" in query.expression]
    assert expressions
    assert all("kube_pod_container_resource_limits" in each for each in expressions)


def test_only_real_network_interfaces_count() -> None:
    (pattern,) = {
        found
        for query in panel_queries()
        for found in re.findall(r'device!~"([^"]+)"', query.expression)
        if "node_network" in query.expression
    }
    for virtual in ("lo", "veth1a2b", "docker0", "br-77ab", "cilium_vxlan", "lxc_health", "cali9f"):
        assert re.fullmatch(pattern, virtual)
    for real in ("eth0", "ens3"):
        assert not re.fullmatch(pattern, real)


def test_the_collector_uses_only_what_it_declares() -> None:
    config = load_yaml(ROOT / "monitoring" / "otel" / "collector.yml")
    assert set(config["service"]["extensions"]) <= set(config["extensions"])
    for pipeline in config["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= set(config[kind])
