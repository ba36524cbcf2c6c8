"""The service and the real monitoring programs as processes on loopback: free ports, a folder of their own.

Used by the demonstration and by the tests. The programs are Debian's ``prometheus``,
``prometheus-alertmanager`` and ``prometheus-node-exporter``; their system services and default ports are not
touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from loadtest.processes import ROOT, LiveServer, Servers, free_port

MONITORING = ROOT / "monitoring"


class MissingProgramError(Exception):
    """A program that this machine does not have; the message says what to install."""


def find_program(name: str, package: str) -> str:
    """Its path. Raises MissingProgramError."""
    path = shutil.which(name)
    if path is None:
        raise MissingProgramError(f"{name} is not installed (Debian package {package})")
    return path


class LocalStack(Servers):
    """Servers, the monitoring programs among them."""

    def prometheus(
        self,
        scrapes: Mapping[str, Sequence[str]],
        *,
        interval_s: float = 1.0,
        alertmanager: LiveServer | None = None,
    ) -> LiveServer:
        """Prometheus with the project's own rules and alerts; `scrapes` gives each job its targets.

        Everything happens every `interval_s`, rules that have a longer interval of their own too.
        """
        program = find_program("prometheus", "prometheus")
        port = free_port()
        interval = f"{round(interval_s * 1000)}ms"
        config: dict[str, Any] = {
            "global": {
                "scrape_interval": interval,
                "scrape_timeout": interval,
                "evaluation_interval": interval,
            },
            "rule_files": [str(self._rules(interval))],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": list(targets)}]}
                for job, targets in scrapes.items()
            ],
        }
        if alertmanager is not None:
            target = {"targets": [alertmanager.address]}
            config["alerting"] = {"alertmanagers": [{"static_configs": [target]}]}
        path = self.folder / f"prometheus-{port}.yml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [
            program,
            f"--config.file={path}",
            f"--storage.tsdb.path={self.folder / f'tsdb-{port}'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--enable-feature=exemplar-storage",
            "--log.level=warn",
        ]
        return self.start("prometheus", command, "/-/ready")

    def _rules(self, interval: str) -> Path:
        """A file with every rule and alert of the project."""
        groups = [
            {**group, "interval": interval}
            for folder in ("rules", "alerts")
            for path in sorted((MONITORING / "prometheus" / folder).glob("*.yml"))
            for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        ]
        path = self.folder / f"rules-{interval}.yml"
        path.write_text(yaml.safe_dump({"groups": groups}), encoding="utf-8")
        return path

    def alertmanager(self, config: Mapping[str, Any]) -> LiveServer:
        """Alertmanager with `config`, without a cluster."""
        program = find_program("prometheus-alertmanager", "prometheus-alertmanager")
        port = free_port()
        path = self.folder / f"alertmanager-{port}.yml"
        path.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
        command = [
            program,
            f"--config.file={path}",
            f"--storage.path={self.folder / f'alertmanager-{port}'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
            "--log.level=warn",
        ]
        return self.start("alertmanager", command, "/-/ready")

    def node_exporter(self) -> LiveServer:
        """The machine's own metrics."""
        program = find_program("prometheus-node-exporter", "prometheus-node-exporter")
        port = free_port()
        command = [program, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
        return self.start("node-exporter", command, "/metrics")


class PrometheusApi:
    """Queries to a running Prometheus."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30.0)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector of `expression`, now. Raises ValueError with Prometheus's own words."""
        answer = self._client.post("/api/v1/query", data={"query": expression}).json()
        if answer["status"] != "success":
            raise ValueError(f"{answer.get('error')}: {expression}")
        result = answer["data"]["result"]
        return result if answer["data"]["resultType"] != "scalar" else [{"metric": {}, "value": result}]

    def value(self, expression: str) -> float | None:
        """The one value of `expression`; None where there is none."""
        result = self.query(expression)
        return float(result[0]["value"][1]) if result else None

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of any other endpoint under /api/v1."""
        return self._client.get(f"/api/v1/{path}", params=parameters).json()["data"]

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
