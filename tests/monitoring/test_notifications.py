"""What the real Alertmanager sends to PagerDuty and Slack, with the project's own routes and texts."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from loadtest.local_stack import LocalStack, MissingProgramError
from tests.monitoring.files import ROOT, load_yaml

pytestmark = [pytest.mark.telemetry, pytest.mark.slow]

TIMEOUT_S = 30.0


class Inbox:
    """Takes what is sent to /<receiver>, on a free loopback port."""

    def __init__(self) -> None:
        self._messages: dict[str, queue.Queue[Any]] = {"page": queue.Queue(), "ticket": queue.Queue()}
        messages = self._messages

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                messages[self.path.strip("/")].put(body)
                self.send_response(202 if self.path == "/page" else 200)
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def next(self, receiver: str) -> Any:
        """The next message for `receiver`."""
        return self._messages[receiver].get(timeout=TIMEOUT_S)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def config(inbox: Inbox) -> dict[str, Any]:
    """The project's own, with other addresses and no waiting."""
    loaded: dict[str, Any] = load_yaml(ROOT / "monitoring" / "alertmanager" / "alertmanager.yml")
    for route in (loaded["route"], *loaded["route"]["routes"]):
        route.update(group_wait="1s", group_interval="1s")
    for receiver in loaded["receivers"]:
        for each in receiver.get("pagerduty_configs", []):
            del each["routing_key_file"]
            each.update(routing_key="none", url=f"{inbox.url}/page")
        for each in receiver.get("slack_configs", []):
            del each["api_url_file"]
            each["api_url"] = f"{inbox.url}/ticket"
    return loaded


@pytest.fixture(scope="module")
def inbox() -> Iterator[Inbox]:
    opened = Inbox()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def alertmanager(inbox: Inbox) -> Iterator[str]:
    with LocalStack() as stack:
        try:
            yield stack.alertmanager(config(inbox)).url
        except MissingProgramError as missing:
            pytest.skip(str(missing))


def alert(name: str, severity: str, instance: str) -> dict[str, Any]:
    """As Prometheus sends it; two replicas have two summaries."""
    return {
        "labels": {"alertname": name, "severity": severity, "job": "asr-api", "instance": instance},
        "annotations": {
            "summary": f"{instance} is ill",
            "description": f"{instance} has been ill for a while.",
            "runbook_url": f"docs/runbooks/{name}.md",
        },
    }


def send(url: str, *alerts: dict[str, Any]) -> None:
    httpx.post(f"{url}/api/v2/alerts", json=list(alerts), timeout=TIMEOUT_S).raise_for_status()


def test_a_page_for_two_replicas_has_a_summary(inbox: Inbox, alertmanager: str) -> None:
    """PagerDuty refuses an event without one, so nobody would be woken."""
    name = "AsrWorkerStalled"
    send(alertmanager, alert(name, "critical", "pod-a"), alert(name, "critical", "pod-b"))
    payload = inbox.next("page")["payload"]
    assert payload["summary"] == "AsrWorkerStalled: pod-a is ill (and 1 more)"
    details = payload["custom_details"]
    assert details["runbook"] == "docs/runbooks/AsrWorkerStalled.md"
    assert "pod-a has been ill" in details["description"]
    assert "pod-b has been ill" in details["description"]


def test_a_ticket_for_two_replicas_names_both(inbox: Inbox, alertmanager: str) -> None:
    name = "AsrQueueNearLimit"
    send(alertmanager, alert(name, "warning", "pod-a"), alert(name, "warning", "pod-b"))
    (attachment,) = inbox.next("ticket")["attachments"]
    assert attachment["title"] == "AsrQueueNearLimit: pod-a is ill (and 1 more)"
    assert "pod-a has been ill" in attachment["text"]
    assert "pod-b has been ill" in attachment["text"]
    assert "docs/runbooks/AsrQueueNearLimit.md" in attachment["text"]


def test_a_single_alert_reads_as_before(inbox: Inbox, alertmanager: str) -> None:
    send(alertmanager, alert("AsrModelNotLoaded", "critical", "pod-a"))
    assert inbox.next("page")["payload"]["summary"] == "AsrModelNotLoaded: pod-a is ill"


def test_an_outage_holds_back_what_follows_from_it(alertmanager: str) -> None:
    """By the label `job`, which every alert of the service has (promtool's tests)."""
    names = {"AsrServiceDown": "active", "AsrReplicaMissing": "suppressed", "AsrNotReady": "suppressed"}
    for name in names:
        send(alertmanager, alert(name, "critical" if name == "AsrServiceDown" else "warning", "pod-a"))
    until_s = time.monotonic() + TIMEOUT_S
    states: dict[str, str] = {}
    while {name: states.get(name) for name in names} != names and time.monotonic() < until_s:
        time.sleep(0.2)
        listed = httpx.get(f"{alertmanager}/api/v2/alerts", timeout=TIMEOUT_S).json()
        states = {each["labels"]["alertname"]: each["status"]["state"] for each in listed}
    assert {name: states.get(name) for name in names} == names
