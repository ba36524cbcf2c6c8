"""Every panel's and every rule's query, sent to a real Prometheus that scrapes the real API for a minute.

The nodes' panels read the real node exporter, the containers' panels a recording of cAdvisor.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import numpy as np
import pytest

from loadtest.local_stack import LocalStack, MissingProgramError, PrometheusApi
from loadtest.processes import LiveServer
from tests.monitoring.files import (
    Query,
    alerts,
    dashboards,
    fill_variables,
    panel_queries,
    panels,
    rule_queries,
    runbook_queries,
)
from tests.monitoring.recording import RecordingServer
from tests.telemetry.live import MODEL, clip, settings, tracing
from tests.telemetry.otlp_receiver import OtlpReceiver
from tests.tiny_bundle import sing, wav

pytestmark = [pytest.mark.telemetry, pytest.mark.slow]

DRIVEN_S = 60.0
INTERVAL_S = 2.0
# Series that only a cluster has; promtool's tests cover the expression that names them.
CLUSTER_ONLY = re.compile(r"^kube_")


@dataclass
class Driven:
    """The stack after its minute of traffic."""

    api: LiveServer
    prometheus: PrometheusApi
    receiver: OtlpReceiver
    names: frozenset[str]
    sent: int


@pytest.fixture(scope="module")
def driven() -> Iterator[Driven]:
    with (
        LocalStack() as stack,
        OtlpReceiver() as receiver,
        RecordingServer() as cadvisor,
        RecordingServer(lambda _: "asr_gateway_up 1\n") as gateway,
    ):
        try:
            nodes = stack.node_exporter()
            api = stack.api(settings(stack.folder / "models", **tracing(receiver)))
            monitor = stack.prometheus(
                {
                    "asr-api": [api.address],
                    "asr-gateway": [gateway.address],
                    "node": [nodes.address],
                    "cadvisor": [cadvisor.address],
                },
                interval_s=INTERVAL_S,
            )
        except MissingProgramError as missing:
            pytest.skip(str(missing))
        prometheus = PrometheusApi(monitor.url)
        sent = drive(api, DRIVEN_S)
        names = frozenset(prometheus.get("label/__name__/values"))
        yield Driven(api, prometheus, receiver, names, sent)
        prometheus.close()


def drive(api: LiveServer, for_s: float) -> int:
    """A little of everything that users do, for `for_s` seconds; returns the number of transcriptions."""
    long_clip = wav(np.tile(sing("bad cafe "), 12))
    until_s = time.monotonic() + for_s
    sent = 0
    with httpx.Client(base_url=api.url, timeout=60.0) as client, ThreadPoolExecutor(4) as pool:

        def one(number: int) -> None:
            file = long_clip if number % 5 == 0 else clip()
            if number % 11 == 0:
                file = b"not audio at all"
            if number % 3 == 0:
                route, fields = "/v1/audio/transcriptions", {"model": MODEL, "language": "en"}
                if number % 2 == 0:
                    fields["stream"] = "true"
            else:
                route, fields = "/transcribe", {"language": "en"}
            client.post(route, files={"file": file}, data=fields)

        while time.monotonic() < until_s:
            list(pool.map(one, range(sent, sent + 4)))
            client.get("/health/live")
            client.get("/no-such-page")
            sent += 4
            time.sleep(0.5)
    return sent


def with_data(queries: Iterator[Query]) -> list[object]:
    return [pytest.param(query, id=query.place) for query in queries]


@pytest.mark.parametrize("query", with_data(panel_queries()))
def test_a_panel_shows_data(driven: Driven, query: Query) -> None:
    result = driven.prometheus.query(query.expression)
    assert result, query.expression
    assert any(sample["value"][1] != "NaN" for sample in result), query.expression


def without_thresholds(expression: str) -> str:
    """The same expression, where a comparison answers 0 or 1 instead of dropping what is under it."""
    return re.sub(r"(>=|==|>)(?! *bool)", r"\1 bool", expression)


@pytest.mark.parametrize("query", with_data(rule_queries()))
def test_a_rule_has_data_to_judge(driven: Driven, query: Query) -> None:
    expression = without_thresholds(query.expression)
    # absent() is empty whenever all is well; what it looks for must be there.
    expression = re.sub(r"^absent\((.*)\)$", r"\1", expression)
    result = driven.prometheus.query(expression)
    assert result, expression
    assert any(sample["value"][1] != "NaN" for sample in result), expression


@pytest.mark.parametrize("query", with_data(runbook_queries()))
def test_a_runbooks_query_can_be_sent_as_it_stands(driven: Driven, query: Query) -> None:
    driven.prometheus.query(query.expression)


def exemplar_queries() -> Iterator[Query]:
    """Of the panels that promise dots."""
    for name, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                if target.get("exemplar"):
                    place = f"{name} / {panel['title']} / {target['refId']}"
                    yield Query(place, fill_variables(target["expr"]))


@pytest.mark.parametrize("query", with_data(exemplar_queries()))
def test_a_panel_that_promises_dots_has_some(driven: Driven, query: Query) -> None:
    assert exemplars(driven.prometheus, query.expression), query.expression


def exemplars(prometheus: PrometheusApi, expression: str) -> set[str]:
    """The trace ids of the last ten minutes' exemplars."""
    end_s = time.time()
    series = prometheus.get("query_exemplars", query=expression, start=str(end_s - 600), end=str(end_s))
    return {item["labels"]["trace_id"] for entry in series for item in entry["exemplars"]}


def metric_names(expression: str) -> set[str]:
    """The metrics that an expression reads."""
    bare = re.sub(r"\b(by|on|ignoring|group_left) *\([^)]*\)", "", expression)
    bare = re.sub(r"\{[^}]*\}", "", re.sub(r'"[^"]*"', "", bare))
    return set(re.findall(r"\b[a-z][a-z0-9_:]*_[a-z0-9_:]+\b(?! *\()", bare))


def test_every_query_names_metrics_that_exist(driven: Driven) -> None:
    unknown = {}
    for query in [*panel_queries(), *rule_queries(), *runbook_queries()]:
        for name in metric_names(query.expression) - driven.names - ONLY_ELSEWHERE:
            if not CLUSTER_ONLY.match(name):
                unknown[name] = query.place
    assert unknown == {}


# cAdvisor has these or others, by the version of the host's control groups; the panel reads both. What a
# container uses of its memory is known only where it has a limit; rule and panel read the process's then.
ONLY_ELSEWHERE = {
    "container_fs_reads_bytes_total",
    "container_fs_writes_bytes_total",
    "asr_memory_used_bytes",
}


def test_prometheus_evaluated_every_rule_without_an_error(driven: Driven) -> None:
    groups = driven.prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules if rule["type"] == "alerting"} == {
        alert["alert"] for alert in alerts()
    }
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []


def test_every_target_is_up(driven: Driven) -> None:
    up = {sample["metric"]["job"]: sample["value"][1] for sample in driven.prometheus.query("up")}
    assert up == {"asr-api": "1", "asr-gateway": "1", "node": "1", "cadvisor": "1"}


def test_the_sums_in_prometheus_are_the_requests_sent(driven: Driven) -> None:
    time.sleep(2 * INTERVAL_S)
    assert driven.prometheus.value("sum(asr_requests_total)") == driven.sent


def test_exemplars_lead_to_traces_that_the_backend_has(driven: Driven) -> None:
    found = exemplars(driven.prometheus, "asr_request_duration_seconds_bucket")
    assert found
    known = {span.trace_id for span in driven.receiver.spans() if span.name.startswith("POST")}
    assert found <= known
