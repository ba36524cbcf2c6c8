"""make e2e-k8s: k8s/setup.sh and the production overlay on a real API server, scheduler and kubelet.

Three ready replicas, a rolling update under load without a failed request, readiness gating seen, a pod
deleted, a container killed with SIGKILL, a bad version that never takes traffic and is rolled back, resources
within limits, and k8s/teardown.sh at the end. Needs the images asr-api:e2e and asr-ui:e2e, which make e2e
builds.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.e2e_docker.cluster import (
    NAMESPACE,
    Cluster,
    EndpointWatch,
    LoadBalancers,
    for_old_api,
    is_ready,
    running,
)
from tests.e2e_docker.load import Clip, Load, Tally, learn
from tests.e2e_docker.tools import (
    ROOT,
    Report,
    Skip,
    audio_files,
    main,
    model_name,
    require_docker,
    run,
    succeeds,
    wait_for,
)

REPLICAS = 3
CLIENTS = 3
TAG = "e2e"
URL = f"http://{LoadBalancers.ADDRESSES['asr-api']}"


def overlay(cluster: Cluster, folder: Path, model: str) -> Path:
    """The production overlay as this API server and this node can take it."""
    folder.mkdir(parents=True, exist_ok=True)
    manifests = for_old_api(run("kubectl", "kustomize", "k8s/overlays/production"))
    manifests = manifests.replace("ASR_MODELS: en-moonshine-tiny", f"ASR_MODELS: {model}")
    (folder / "production.yaml").write_text(manifests)
    (folder / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n  - production.yaml\n"
    )
    return folder


def setup(cluster: Cluster, folder: Path, tag: str = TAG, timeout_s: int = 400) -> str:
    """k8s/setup.sh as an operator runs it, on this cluster."""
    return run(
        "k8s/setup.sh", "--kubeconfig", str(cluster.kubeconfig), "--overlay", str(folder), "--tag", tag,
        "--timeout", str(timeout_s), timeout_s=timeout_s * 3,
    )  # fmt: skip


def api_key(cluster: Cluster) -> str:
    """The key that setup.sh made, read as its output says."""
    encoded = cluster.kubectl("get", "secret", "asr-api-keys", "--output=jsonpath={.data.ui-key}")
    return run("base64", "--decode", stdin=encoded)


def ready_pods(cluster: Cluster) -> int:
    return sum(is_ready(pod) for pod in cluster.pods())


def restarts(cluster: Cluster) -> int:
    """How often the kubelet has started a container of the API again."""
    states = [state for pod in cluster.pods() for state in pod["status"].get("containerStatuses", [])]
    return sum(state["restartCount"] for state in states)


def cgroup_files(pod: dict[str, Any], controller: str, name: str) -> int:
    """A number from the pod's cgroup (v1), or -1 when the layout is another."""
    for path in Path(f"/sys/fs/cgroup/{controller}").rglob(f"*pod{pod['metadata']['uid']}/{name}"):
        return int(path.read_text())
    return -1


async def during_load(
    clips: list[Clip], headers: dict[str, str], *commands: tuple[str, ...], cluster: Cluster
) -> Tally:
    """Run kubectl commands one after the other while clients go on."""
    async with Load(URL, clips, CLIENTS, headers) as load:
        for command in commands:
            await load.answered(8)
            await asyncio.to_thread(cluster.kubectl, *command, timeout_s=600)
            await load.answered(8)
    return load.tally


async def kill_container(clips: list[Clip], headers: dict[str, str], cluster: Cluster) -> Tally:
    """SIGKILL to the process of one API container; the kubelet starts it again, and it gets ready."""
    before = restarts(cluster)
    victim = cluster.pods()[0]["status"]["containerStatuses"][0]["containerID"].removeprefix("docker://")
    async with Load(URL, clips, CLIENTS, headers) as load:
        await load.answered(8)
        pid = int(cluster.docker("inspect", "--format={{.State.Pid}}", victim))
        os.kill(pid, signal.SIGKILL)
        await load.answered(8)
        await asyncio.to_thread(
            wait_for,
            "the killed container",
            lambda: restarts(cluster) > before and ready_pods(cluster) == REPLICAS,
            180,
        )
        await load.answered(8)
    return load.tally


def check_start(report: Report, cluster: Cluster) -> None:
    pods = cluster.pods()
    report.check(sum(map(is_ready, pods)) == REPLICAS, f"replicas: {REPLICAS} pods ready")
    limits = pods[0]["spec"]["containers"][0]["resources"]["limits"]
    log = cluster.kubectl("logs", pods[0]["metadata"]["name"])
    configured = next(json.loads(line) for line in log.splitlines() if '"engine_configured"' in line)
    threads = configured["workers"] * configured["threads_per_worker"]
    report.check(str(threads) == limits["cpu"], f"threads: {threads} for a CPU limit of {limits['cpu']}")
    name = pods[0]["metadata"]["name"]
    identity = cluster.kubectl("exec", name, "--", "id", "-u").strip()
    report.check(identity == "10001", f"rights: runs as user {identity}")
    refused = not succeeds(
        "kubectl",
        f"--kubeconfig={cluster.kubeconfig}",
        "-n",
        NAMESPACE,
        "exec",
        name,
        "--",
        "touch",
        "/app/x",
    )
    report.check(refused, "rights: the root file system is read-only")
    token = cluster.kubectl(
        "exec", name, "--", "sh", "-c", "ls /var/run/secrets/kubernetes.io 2>/dev/null | wc -l"
    ).strip()
    report.check(token == "0", "rights: no service account token in the pod")


def check_page(report: Report, cluster: Cluster) -> None:
    """The page has no public address; kube-proxy forwards its cluster address from this machine too."""
    spec = cluster.get("service", "asr-ui")["spec"]
    report.check(spec["type"] == "ClusterIP", "page: has no address outside the cluster")
    with urllib.request.urlopen(f"http://{spec['clusterIP']}/_stcore/health", timeout=30) as answer:
        report.check(answer.status == 200, "page: healthy inside the cluster")


def check_resources(report: Report, cluster: Cluster, seconds: float = 20.0) -> None:
    """Memory stays under the limit, CPU under its share, nothing was killed for memory."""
    pods = cluster.pods()
    before = [cgroup_files(pod, "cpuacct", "cpuacct.usage") for pod in pods]
    time.sleep(seconds)
    after = [cgroup_files(pod, "cpuacct", "cpuacct.usage") for pod in pods]
    if -1 in before:
        report.skipped("resources: this machine's cgroups are laid out in another way")
        return
    cores = max((b - a) / 1e9 / seconds for a, b in zip(before, after, strict=True))
    report.check(cores <= 1.05, f"CPU: at most {cores:.2f} cores of a limit of 1", round(cores, 2))
    peak = max(cgroup_files(pod, "memory", "memory.max_usage_in_bytes") for pod in pods)
    report.check(peak < 1536 << 20, f"memory: at most {peak / (1 << 20):.0f} MiB of a limit of 1536", peak)
    reasons = [
        state.get("lastState", {}).get("terminated", {}).get("reason")
        for pod in pods
        for state in pod["status"]["containerStatuses"]
    ]
    report.check("OOMKilled" not in reasons, "memory: no container was killed for it")


def bad_version(
    report: Report, cluster: Cluster, folder: Path, clips: list[Clip], headers: dict[str, str]
) -> None:
    """An image that does not exist: setup.sh fails, the old pods serve on, `make rollback-k8s` mends it."""
    failed = False
    try:
        setup(cluster, folder, tag="does-not-exist", timeout_s=20)
    except RuntimeError:
        failed = True
    report.check(failed, "bad version: k8s/setup.sh ends with an error")
    report.check(ready_pods(cluster) == REPLICAS, f"bad version: {REPLICAS} pods of the good one serve on")
    run("make", "rollback-k8s", env={"KUBECONFIG": str(cluster.kubeconfig)})
    wait_for("the rollback", lambda: len(cluster.pods()) == REPLICAS == ready_pods(cluster), 120)
    images = {pod["spec"]["containers"][0]["image"] for pod in cluster.pods()}
    report.check(images == {f"asr-api:{TAG}"}, "rollback: make rollback-k8s brings the version before back")
    tally = asyncio.run(_brief(clips, headers))
    report.check(not tally.failures, f"rollback: {tally.answered} requests, none failed")


async def _brief(clips: list[Clip], headers: dict[str, str]) -> Tally:
    async with Load(URL, clips, CLIENTS, headers) as load:
        await load.answered(10)
    return load.tally


def proof(report: Report) -> None:
    require_docker()
    model = model_name()
    files = audio_files()
    for kind in ("api", "ui"):
        if not succeeds("docker", "image", "inspect", f"asr-{kind}:{TAG}"):
            raise Skip(f"there is no image asr-{kind}:{TAG}; run make e2e first, which builds it")
    report.step("Cluster")
    with running() as cluster:
        node = cluster.get("nodes")["items"][0]
        report.check(True, f"cluster: Kubernetes {node['status']['nodeInfo']['kubeletVersion']}, one node")
        for kind in ("api", "ui"):
            cluster.load_image(f"asr-{kind}:{TAG}")
        balancers = LoadBalancers(cluster)
        balancers.start()
        try:
            exercise(report, cluster, files, model)
        finally:
            balancers.stop()


def exercise(report: Report, cluster: Cluster, files: list[Path], model: str) -> None:
    """Everything that is done to the cluster."""
    report.step("k8s/setup.sh, twice")
    folder = overlay(cluster, ROOT / "build" / "e2e-k8s", model)
    output = setup(cluster, folder)
    report.check(URL in output, "setup.sh: applied, waited, printed the address")
    wait_for("three ready replicas", lambda: ready_pods(cluster) == REPLICAS, 300)
    key = api_key(cluster)
    setup(cluster, folder)
    report.check(api_key(cluster) == key, "setup.sh: a second run changes nothing and keeps the key")
    wait_for("three ready replicas", lambda: ready_pods(cluster) == REPLICAS, 300)
    check_start(report, cluster)
    headers = {"Authorization": f"Bearer {key}"}
    run("make", "smoke-k8s", f"URL={URL}", env={"ASR_API_KEY": key, "KUBECONFIG": str(cluster.kubeconfig)})
    report.check(True, "smoke test: through the load balancer's address, with the key")
    refused = subprocess.run(
        [
            "curl",
            "-s",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "-F",
            f"file=@{files[0]}",
            f"{URL}/transcribe",
        ],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    report.check(refused == "401", f"keys: without one the answer is {refused}")
    check_page(report, cluster)
    clips = asyncio.run(learn(URL, files, headers))

    report.step(f"Rolling update under load ({CLIENTS} clients)")
    before = {pod["metadata"]["name"] for pod in cluster.pods()}
    watch = EndpointWatch(cluster)
    watch.start()
    tally = asyncio.run(
        during_load(
            clips,
            headers,
            ("rollout", "restart", "deployment/asr-api"),
            ("rollout", "status", "deployment/asr-api", "--timeout=500s"),
            cluster=cluster,
        )
    )
    wait_for("the last old pod to go", lambda: len(cluster.pods()) == REPLICAS, 120)
    watch.stop()
    print(f"        {tally.line()}")
    report.check(
        not tally.failures,
        f"rolling update, requests answered: {tally.answered}, {len(tally.failures)} failed",
        tally.answered,
    )
    after = {pod["metadata"]["name"] for pod in cluster.pods()}
    report.check(not before & after, f"rolling update: {REPLICAS} new pods, none of the old ones")
    report.check(
        watch.fewest_ready >= REPLICAS,
        f"maxUnavailable 0: never under {watch.fewest_ready} endpoints in {watch.samples} samples",
    )
    report.check(
        after <= watch.started_unready,
        f"readiness gating: all {len(after)} new pods ran without traffic until ready",
    )

    report.step("Pod deleted, container killed, under load")
    name = sorted(after)[0]
    tally = asyncio.run(during_load(clips, headers, ("delete", "pod", name, "--wait=true"), cluster=cluster))
    wait_for("a new pod", lambda: ready_pods(cluster) == REPLICAS, 180)
    print(f"        {tally.line()}")
    report.check(
        not tally.failures,
        f"pod deleted, requests answered: {tally.answered}, {len(tally.failures)} failed",
        tally.answered,
    )
    tally = asyncio.run(kill_container(clips, headers, cluster))
    print(f"        {tally.line()}")
    report.check(
        not tally.failures,
        f"kill -9, requests answered: {tally.answered}, {len(tally.failures)} failed",
        tally.answered,
    )

    report.step("Resources, bad version, teardown")
    resources = asyncio.run(_under_load(report, cluster, clips, headers))
    print(f"        {resources.line()}")
    bad_version(report, cluster, folder, clips, headers)
    run(
        "k8s/teardown.sh",
        "--only",
        "app",
        "--kubeconfig",
        str(cluster.kubeconfig),
        "--yes",
        "--timeout",
        "180",
    )
    gone = not succeeds("kubectl", f"--kubeconfig={cluster.kubeconfig}", "get", "namespace", NAMESPACE)
    report.check(gone, "teardown.sh: the application is gone")


async def _under_load(report: Report, cluster: Cluster, clips: list[Clip], headers: dict[str, str]) -> Tally:
    async with Load(URL, clips, 2 * CLIENTS, headers, think_s=0.0) as load:
        await load.answered(5)
        await asyncio.to_thread(check_resources, report, cluster)
    return load.tally


if __name__ == "__main__":
    main("kubernetes", proof)
