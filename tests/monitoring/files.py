"""The files under monitoring/, read once for the tests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "monitoring" / "prometheus"
GRAFANA = ROOT / "monitoring" / "grafana"
RUNBOOKS = ROOT / "docs" / "runbooks"

_PROMQL_FENCE = re.compile(r"```promql\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Query:
    """One PromQL expression and where it stands."""

    place: str
    expression: str


def load_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@cache
def dashboards() -> dict[str, dict[str, Any]]:
    """Dashboards by file name without its ending."""
    paths = sorted((GRAFANA / "dashboards").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels that show something; rows are headings."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def rules(folder: str) -> list[dict[str, Any]]:
    """Every rule under prometheus/<folder>."""
    files = sorted((PROMETHEUS / folder).glob("*.yml"))
    groups = [group for path in files for group in load_yaml(path)["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return rules("alerts")


def panel_queries() -> Iterator[Query]:
    """Every target of every panel, Grafana's variables filled in for a short test."""
    for name, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                place = f"{name} / {panel['title']} / {target['refId']}"
                yield Query(place, fill_variables(target["expr"]))


def rule_queries() -> Iterator[Query]:
    for rule in rules("rules") + alerts():
        yield Query(rule.get("record") or rule["alert"], rule["expr"])


def runbook_queries() -> Iterator[Query]:
    for path in sorted(RUNBOOKS.glob("*.md")):
        for block in _PROMQL_FENCE.findall(path.read_text(encoding="utf-8")):
            yield Query(path.stem, re.sub(r"(?m)^   ", "", block).strip())


def fill_variables(expression: str, window: str = "30s") -> str:
    """Grafana's variables as they are when everything is selected."""
    filled = expression.replace("$__rate_interval", window).replace("$__range", "5m")
    filled = re.sub(r"\$(instance|model|node)\b", ".*", filled)
    assert "$" not in filled, expression
    return filled
