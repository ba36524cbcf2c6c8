"""A one-node Kubernetes on this machine for the proof: started, asked, and taken away again.

The binaries come from Debian's source package (the shared tool mkkube.sh), so the API is that of 1.20. Two of
the objects that production uses have newer API versions; ``for_old_api`` rewrites exactly those, and nothing
in k8s/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from tests.e2e_docker.tools import SHARED, Skip, run, succeeds

BINARIES = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
BIN = Path(os.environ.get("ASR_KUBE_BIN", "/var/cache/asr-kube"))
STATE = Path(os.environ.get("ASR_KUBE_STATE", "/var/tmp/asr-kube-state"))
NAMESPACE = "asr-system"


class Cluster:
    """kubectl and docker of the running node."""

    def __init__(self, state: Path) -> None:
        self.kubeconfig = state / "admin.kubeconfig"
        self.docker_host = f"unix://{state}/docker.sock"

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = 300) -> str:
        """Standard output of kubectl in the service's namespace."""
        return run(
            "kubectl", f"--kubeconfig={self.kubeconfig}", f"--namespace={NAMESPACE}", *arguments,
            stdin=stdin, timeout_s=timeout_s,
        )  # fmt: skip

    def get(self, *arguments: str) -> dict[str, Any]:
        """An object or a list as JSON."""
        value: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "--output=json"))
        return value

    def docker(self, *arguments: str) -> str:
        """The node's own Docker engine."""
        return run("docker", f"--host={self.docker_host}", *arguments)

    def pods(self, app: str = "asr-api") -> list[dict[str, Any]]:
        """Pods of one application that are not being deleted."""
        items: list[dict[str, Any]] = self.get("pods", f"--selector=app.kubernetes.io/name={app}")["items"]
        return [pod for pod in items if "deletionTimestamp" not in pod["metadata"]]

    def load_image(self, image: str) -> None:
        """Carry an image from the machine's engine to the node's."""
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saving:
            subprocess.run(
                ["docker", f"--host={self.docker_host}", "load", "--quiet"],
                stdin=saving.stdout, check=True, capture_output=True,
            )  # fmt: skip


def is_ready(pod: dict[str, Any]) -> bool:
    """Whether the pod's Ready condition is true."""
    conditions = pod["status"].get("conditions", [])
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def for_old_api(manifests: str) -> str:
    """The same manifests with the two API versions that Kubernetes 1.20 knows, and small requests.

    One node of two cores has to hold three replicas and a fourth while rolling: the CPU *requests* shrink,
    the limits, which the engine's threads follow, stay as shipped. The page runs once.
    """
    text = manifests.replace("apiVersion: autoscaling/v2\n", "apiVersion: autoscaling/v2beta2\n")
    text = text.replace("apiVersion: policy/v1\n", "apiVersion: policy/v1beta1\n")
    text = re.sub(r"(requests:\n\s+cpu: )(?:600m|100m)", r"\g<1>50m", text)
    parts = []
    for part in text.split("\n---\n"):
        if "kind: HorizontalPodAutoscaler" in part and "name: asr-ui" in part:
            part = part.replace("minReplicas: 3", "minReplicas: 1")
        parts.append(part)
    return "\n---\n".join(parts)


@contextmanager
def running() -> Iterator[Cluster]:
    """Start control plane and node, stop both at the end. Raises Skip when a part is missing."""
    tools = SHARED / "tools"
    if not (tools / "kube-up.sh").is_file():
        raise Skip("the tools that start a Kubernetes on this machine are not here (ASR_SHARED_DIR)")
    if absent := [name for name in BINARIES if not (BIN / name).is_file()]:
        raise Skip(f"{', '.join(absent)} not in {BIN}; build them once: {tools / 'mkkube.sh'} {BIN}")
    if absent := [
        name for name in ("etcd", "kubectl", "conntrack", "socat", "jq") if shutil.which(name) is None
    ]:
        raise Skip(f"missing: {', '.join(absent)}")
    if os.geteuid() != 0:
        raise Skip("a kubelet needs root")
    cluster = Cluster(STATE)
    environment = {
        "DOCKER_HOST": cluster.docker_host, "NODEBR": "asrk0", "DOCKER_ROOT": f"{STATE}/docker",
    }  # fmt: skip
    try:
        # The tools leave daemons behind that hold their output open, so it goes to a file, not to a pipe.
        for command in (
            ("kube-dockerd.sh", str(STATE)),
            ("kube-up.sh", str(BIN), str(STATE), "control"),
            ("kube-up.sh", str(BIN), str(STATE), "node"),
        ):
            with (STATE.parent / "asr-kube.log").open("ab") as log:
                extra = environment if command[0] != "kube-dockerd.sh" else {}
                done = subprocess.run(
                    [str(tools / command[0]), *command[1:]],
                    env={**os.environ, **extra},
                    stdout=log,
                    stderr=log,
                    timeout=300,
                    check=False,
                )
            if done.returncode != 0:
                raise RuntimeError(
                    f"{command[0]} ended with {done.returncode}; see {STATE.parent / 'asr-kube.log'}"
                )
        yield cluster
    finally:
        with (STATE.parent / "asr-kube.log").open("ab") as log:
            subprocess.run(
                [str(tools / "kube-down.sh"), str(STATE), str(BIN)],
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
                timeout=300,
                check=False,
            )


class LoadBalancers(threading.Thread):
    """What DigitalOcean's cloud controller does: gives every Service of type LoadBalancer an address.

    kube-proxy then forwards that address to the ready pods, as on any cluster, from this machine too.
    """

    ADDRESSES: ClassVar[dict[str, str]] = {"asr-api": "10.251.0.10"}

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self._cluster, self._ending = cluster, threading.Event()

    def run(self) -> None:
        done: set[str] = set()
        while not self._ending.wait(2.0) and done != set(self.ADDRESSES):
            for service, address in self.ADDRESSES.items():
                status = json.dumps({"status": {"loadBalancer": {"ingress": [{"ip": address}]}}})
                if service not in done and succeeds(
                    "kubectl", f"--kubeconfig={self._cluster.kubeconfig}", f"--namespace={NAMESPACE}",
                    "patch", "service", service, "--subresource=status", "--type=merge", f"--patch={status}",
                ):  # fmt: skip
                    done.add(service)

    def stop(self) -> None:
        self._ending.set()
        self.join()


class EndpointWatch(threading.Thread):
    """Samples which pods exist, which are ready, and which receive traffic, several times a second."""

    def __init__(self, cluster: Cluster, service: str = "asr-api") -> None:
        super().__init__(daemon=True)
        self._cluster, self._service, self._ending = cluster, service, threading.Event()
        self.samples = 0
        self.fewest_ready = 10**6
        self.started_unready: set[str] = set()  # pods seen running and not yet receiving traffic

    def run(self) -> None:
        while not self._ending.is_set():
            endpoints = self._cluster.get("endpoints", self._service)
            pods = self._cluster.pods(self._service)
            subsets = endpoints.get("subsets", [])
            receiving = {a["targetRef"]["name"] for s in subsets for a in s.get("addresses", [])}
            self.samples += 1
            self.fewest_ready = min(self.fewest_ready, len(receiving))
            for pod in pods:
                name = pod["metadata"]["name"]
                states = pod["status"].get("containerStatuses", [])
                if states and "running" in states[0]["state"] and not is_ready(pod) and name not in receiving:
                    self.started_unready.add(name)
            self._ending.wait(0.3)

    def stop(self) -> None:
        self._ending.set()
        self.join()
