"""What the rendered manifests promise: rights, limits, times that fit together, settings that exist."""

from __future__ import annotations

import re
import shutil
import tomllib
from typing import Any

import pytest
import yaml

from api.server import _LAST_SCRAPE_WAIT_S
from api.settings import Settings
from loadtest.capacity import p95_wait
from tests.infra.render import COMPONENTS, OVERLAYS, ROOT, combination, overlay

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl renders the manifests; it is not here"
)

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module", params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(overlay(request.param)))


@pytest.fixture(scope="module")
def production() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(overlay("production")))


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {item["metadata"]["name"]: item for item in objects if item["kind"] == kind}


def settings_of(objects: list[dict[str, Any]], name: str) -> dict[str, str]:
    """Data of the one ConfigMap whose generated name starts so."""
    (found,) = [
        item["data"] for key, item in of_kind(objects, "ConfigMap").items() if key.startswith(f"{name}-")
    ]
    return found  # type: ignore[no-any-return]


def seconds(value: object) -> float:
    return float(str(value))


def test_describe_pod_says_why_the_service_did_not_start(objects: list[dict[str, Any]]) -> None:
    (api,) = of_kind(objects, "Deployment")["asr-api"]["spec"]["template"]["spec"]["containers"]
    assert api["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_every_pod_has_the_least_rights(objects: list[dict[str, Any]]) -> None:
    deployments = of_kind(objects, "Deployment")
    assert set(deployments) == {"asr-api", "asr-ui"}
    for deployment in deployments.values():
        pod = deployment["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 10000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert container[probe]["httpGet"]["port"] == "http"


def test_images_are_pinned_to_a_version(production: list[dict[str, Any]]) -> None:
    for name, deployment in of_kind(production, "Deployment").items():
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            assert container["image"] == f"{name}:{VERSION}"


def test_the_cluster_autoscaler_may_take_a_node_with_any_of_the_pods_away(
    objects: list[dict[str, Any]],
) -> None:
    """By default it keeps every node with a pod that has local storage: the cluster would never shrink."""
    for deployment in of_kind(objects, "Deployment").values():
        template = deployment["spec"]["template"]
        local = {volume["name"] for volume in template["spec"]["volumes"] if "emptyDir" in volume}
        key = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"
        assert set(template["metadata"]["annotations"][key].split(",")) == local


def test_rolling_updates_never_take_a_replica_away(objects: list[dict[str, Any]]) -> None:
    for deployment in of_kind(objects, "Deployment").values():
        assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_base_asks_for_three_replicas_and_production_leaves_the_number_to_the_autoscaler(
    production: list[dict[str, Any]],
) -> None:
    for deployment in of_kind(list(yaml.safe_load_all(combination(()))), "Deployment").values():
        assert deployment["spec"]["replicas"] == 3
    for name, autoscaler in of_kind(production, "HorizontalPodAutoscaler").items():
        assert "replicas" not in of_kind(production, "Deployment")[name]["spec"]
        assert autoscaler["spec"]["minReplicas"] == 3


def test_settings_exist_and_are_accepted(objects: list[dict[str, Any]]) -> None:
    values = {key: value for key, value in settings_of(objects, "asr-api").items() if value}
    fields = {f"ASR_{name.upper()}" for name in Settings.model_fields}
    assert {key for key in values if key.startswith("ASR_")} <= fields
    given = {key.removeprefix("ASR_").lower(): value for key, value in values.items() if key in fields}
    Settings(_env_file=None, **given)  # type: ignore[call-arg]  # raises when the service would refuse to start


def test_stopping_fits_into_the_grace_period(objects: list[dict[str, Any]]) -> None:
    values = settings_of(objects, "asr-api")
    pod = of_kind(objects, "Deployment")["asr-api"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    pre_stop_s = seconds(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_s = seconds(values["ASR_DRAIN_GRACE_S"]) + seconds(values["ASR_DRAIN_TIMEOUT_S"])
    assert pre_stop_s + drain_s + _LAST_SCRAPE_WAIT_S < pod["terminationGracePeriodSeconds"]
    probe = container["readinessProbe"]
    assert seconds(values["ASR_DRAIN_GRACE_S"]) > probe["periodSeconds"] * probe["failureThreshold"]


def test_kubernetes_gives_a_rollout_up_no_sooner_than_setup_does(objects: list[dict[str, Any]]) -> None:
    """`kubectl rollout status` fails at the deadline, whatever its own timeout says."""
    promised = re.search(r"timeout_s=(\d+)", (ROOT / "k8s/setup.sh").read_text())
    assert promised is not None
    for deployment in of_kind(objects, "Deployment").values():
        assert deployment["spec"]["progressDeadlineSeconds"] >= int(promised[1])


def test_the_load_balancer_waits_longer_than_a_request_may_take(production: list[dict[str, Any]]) -> None:
    annotations = of_kind(production, "Service")["asr-api"]["metadata"]["annotations"]
    prefix = "service.beta.kubernetes.io/do-loadbalancer"
    idle_s = seconds(annotations[f"{prefix}-http-idle-timeout-seconds"])
    values = settings_of(production, "asr-api")
    assert idle_s > seconds(values["ASR_REQUEST_TIMEOUT_S"])


# DigitalOcean's annotations that are used here, as its cloud controller spells them; it ignores others.
# Path, port and protocol of the health check are not among them: without an override they do nothing. Nor is
# the name: it is looked for in the whole account, so a second cluster would take over the first one's.
LOAD_BALANCER = {
    "protocol", "http-idle-timeout-seconds", "size-unit",
    "healthcheck-check-interval-seconds", "healthcheck-response-timeout-seconds",
    "healthcheck-unhealthy-threshold", "healthcheck-healthy-threshold",
    "sticky-sessions-type", "sticky-sessions-cookie-name", "sticky-sessions-cookie-ttl",
}  # fmt: skip


def test_the_cloud_takes_every_annotation_of_a_load_balancer() -> None:
    services = of_kind(list(yaml.safe_load_all(combination(("public-page",)))), "Service")
    prefix = "service.beta.kubernetes.io/do-loadbalancer-"
    for name, service in services.items():
        for key, value in service["metadata"].get("annotations", {}).items():
            assert key.removeprefix(prefix) in LOAD_BALANCER, f"{name}: {key}"
            assert isinstance(value, str), f"{name}: {key}"


def test_only_the_api_is_public_and_the_page_only_by_its_component(objects: list[dict[str, Any]]) -> None:
    """The page has no login and holds a key: published, it makes the keys of the API worthless."""
    services = of_kind(objects, "Service")
    assert services["asr-ui"]["spec"]["type"] == "ClusterIP"
    assert "annotations" not in services["asr-ui"]["metadata"]
    public = of_kind(list(yaml.safe_load_all(combination(("public-page",)))), "Service")
    assert {name: service["spec"]["type"] for name, service in public.items()} == {
        "asr-api": "LoadBalancer",
        "asr-api-metrics": "ClusterIP",
        "asr-ui": "LoadBalancer",
    }
    assert "WARNING" in (ROOT / "k8s/components/public-page/kustomization.yaml").read_text()


def test_threads_follow_the_limit(objects: list[dict[str, Any]]) -> None:
    values = settings_of(objects, "asr-api")
    assert (values["ASR_WORKERS"], values["ASR_THREADS_PER_WORKER"]) == ("0", "0")
    (container,) = of_kind(objects, "Deployment")["asr-api"]["spec"]["template"]["spec"]["containers"]
    assert re.fullmatch(r"[1-9]\d*", str(container["resources"]["limits"]["cpu"]))


def test_the_autoscaler_reads_a_metric_that_the_service_has_and_the_adapter_serves() -> None:
    (autoscaler,) = [
        item for item in yaml.safe_load_all(overlay("production"))
        if item["kind"] == "HorizontalPodAutoscaler" and item["metadata"]["name"] == "asr-api"
    ]  # fmt: skip
    kinds = [metric["type"] for metric in autoscaler["spec"]["metrics"]]
    assert kinds == ["Pods", "Resource"], "queued audio first, CPU as the fallback"
    name = autoscaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    adapter = yaml.safe_load((ROOT / "k8s/monitoring/prometheus-adapter-values.yaml").read_text())
    assert [rule["name"]["as"] for rule in adapter["rules"]["custom"]] == [name]
    assert f'"{name}"' in (ROOT / "api/telemetry/metrics.py").read_text()


def test_the_autoscaler_adds_a_pod_while_waits_are_short(production: list[dict[str, Any]]) -> None:
    """docs/capacity.md: nothing happens within 10 % of the target; a pod is full at 0.91 to 0.99 CPU."""
    container = of_kind(production, "Deployment")["asr-api"]["spec"]["template"]["spec"]["containers"][0]
    workers = int(container["resources"]["limits"]["cpu"])
    autoscaler = of_kind(production, "HorizontalPodAutoscaler")["asr-api"]
    target = autoscaler["spec"]["metrics"][1]["resource"]["target"]["averageValue"]
    cpu = 1.1 * int(target.removesuffix("m")) / 1000 / workers
    assert p95_wait(workers, cpu / 0.91, 0.40) < 10
    assert cpu / 0.99 > 0.5, "half of every pod would idle"


def test_no_alert_of_the_chart_fires_for_ever_on_two_nodes() -> None:
    """KubeCPUOvercommit and KubeMemoryOvercommit ask whether one node less would do."""
    values = yaml.safe_load((ROOT / "k8s/monitoring/kube-prometheus-stack-values.yaml").read_text())
    assert values["defaultRules"]["disabled"] == {"KubeCPUOvercommit": True, "KubeMemoryOvercommit": True}
    for component in ("kubeControllerManager", "kubeScheduler", "kubeEtcd", "kubeProxy"):
        assert values[component]["enabled"] is False


def test_network_policies_start_from_nothing(objects: list[dict[str, Any]]) -> None:
    policies = of_kind(objects, "NetworkPolicy")
    assert policies["deny-all"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ports = {item["port"] for rule in policies["asr-api"]["spec"]["egress"] for item in rule["ports"]}
    assert ports == {4317, 4318}, "the API speaks to the trace collector and to nobody else"


def test_prometheus_sees_a_pod_until_it_is_gone_and_by_its_name(production: list[dict[str, Any]]) -> None:
    """A stopping pod waits for one more scrape; it stays in the Endpoints of such a Service only."""
    monitor = yaml.safe_load((ROOT / "k8s/monitoring/service-monitor.yaml").read_text())
    services = of_kind(production, "Service")
    service = services.pop("asr-api-metrics")
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["clusterIP"] == "None"
    pod = of_kind(production, "Deployment")["asr-api"]["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] in {each["name"] for each in pod["spec"]["containers"][0]["ports"]}
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == port["name"]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert wanted <= service["metadata"]["labels"].items()
    assert service["metadata"]["namespace"] in monitor["spec"]["namespaceSelector"]["matchNames"]
    for other in services.values():
        assert not wanted <= other["metadata"]["labels"].items(), "each pod would be scraped twice"
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "asr-api"
    (relabel,) = endpoint["relabelings"]
    assert (relabel["sourceLabels"], relabel["targetLabel"]) == (["__meta_kubernetes_pod_name"], "instance")


def test_what_the_application_is_scraped_through_comes_and_goes_with_it(
    objects: list[dict[str, Any]],
) -> None:
    """teardown.sh --only app deletes the namespace; the next setup.sh has to bring all of it back."""
    assert of_kind(objects, "Service")["asr-api-metrics"]["metadata"]["namespace"] == "asr-system"
    for path in (ROOT / "k8s/monitoring").glob("*.yaml"):
        for item in yaml.safe_load_all(path.read_text()):
            assert item.get("metadata", {}).get("namespace") != "asr-system", path


def test_components_are_the_promised_ones() -> None:
    assert set(COMPONENTS) >= {"autoscaling", "disruption-budget", "network-policies", "tracing", "gpu"}


def test_namespaces() -> None:
    found = {
        item["metadata"]["name"]
        for item in yaml.safe_load_all(overlay("production"))
        if item["kind"] == "Namespace"
    }
    assert found == {"asr-system", "monitoring", "observability"}
