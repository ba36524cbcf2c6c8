"""terraform/: the defaults that were asked for, and rules that really refuse (no provider needed)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml

from tests.infra.render import ROOT, overlay

TERRAFORM = ROOT / "terraform"


def unquoted(value: object) -> object:
    return value.strip('"') if isinstance(value, str) else value


def variables() -> dict[str, dict[str, Any]]:
    with (TERRAFORM / "variables.tf").open() as file:
        blocks = hcl2.load(file)["variable"]
    return {str(unquoted(name)): body for block in blocks for name, body in block.items()}


def test_every_variable_has_a_type_and_a_description() -> None:
    for name, body in variables().items():
        assert "type" in body, name
        assert len(str(body["description"])) > 20, name


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("kubernetes_version", "1.32.2-do.0"), ("region", "sgp1"), ("maintenance_day", "sunday"),
        ("maintenance_start_time", "04:00"), ("auto_upgrade", True), ("surge_upgrade", True),
        ("node_size", "s-2vcpu-4gb"), ("node_count", 2), ("max_nodes", 7),
    ],
)  # fmt: skip
def test_defaults(name: str, default: object) -> None:
    assert unquoted(variables()[name]["default"]) == default


def test_the_pool_scales_between_one_and_max_nodes() -> None:
    text = (TERRAFORM / "main.tf").read_text()
    assert re.search(r"min_nodes\s+= 1\n", text)
    assert re.search(r"max_nodes\s+= var.max_nodes\n", text)


# Assumed of a node with two CPUs, because nobody here has asked one: what it leaves to pods, and what of that
# DigitalOcean's own daemons take. CPU runs out before memory: two API pods ask for 1.2 CPUs and 1 GiB.
ALLOCATABLE_M, DAEMONS_M = 1900, 520


def millicores(value: object) -> int:
    text = str(value)
    return int(text[:-1]) if text.endswith("m") else 1000 * int(text)


def requests_m(values: object) -> Iterator[int]:
    """CPU requests anywhere in a chart's values."""
    if isinstance(values, dict):
        if "cpu" in (values.get("requests") or {}):
            yield millicores(values["requests"]["cpu"])
        for value in values.values():
            yield from requests_m(value)


def fit(pods: list[int], nodes: int, free_m: int) -> bool:
    """The largest first, each on the first node that has room."""
    left = [free_m] * nodes
    for pod in sorted(pods, reverse=True):
        node = next((index for index, room in enumerate(left) if room >= pod), None)
        if node is None:
            return False
        left[node] -= pod
    return True


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders the manifests; it is not here")
def test_the_default_pool_has_room_for_what_the_autoscalers_may_ask_for() -> None:
    objects = list(yaml.safe_load_all(overlay("production")))
    of_kind = {
        kind: {item["metadata"]["name"]: item["spec"] for item in objects if item["kind"] == kind}
        for kind in ("Deployment", "HorizontalPodAutoscaler")
    }
    least: list[int] = []
    most: list[int] = []
    for name, autoscaler in of_kind["HorizontalPodAutoscaler"].items():
        deployment = of_kind["Deployment"][name]
        (pod,) = requests_m({"": deployment["template"]["spec"]["containers"][0]})
        least += [pod] * autoscaler["minReplicas"]
        surge = deployment["strategy"]["rollingUpdate"]["maxSurge"]
        most += [pod] * (autoscaler["maxReplicas"] + surge)
    monitoring = []
    for path in sorted((ROOT / "k8s/monitoring").glob("*-values.yaml")):
        values = yaml.safe_load(path.read_text())
        exporter = values.pop("prometheus-node-exporter", None)  # one on each node
        if exporter is not None:
            (exporter_m,) = requests_m(exporter)
        monitoring += list(requests_m(values))
    script = (ROOT / "k8s/monitoring-setup.sh").read_text()
    monitoring += [millicores(value) for value in re.findall(r"resources.requests.cpu=(\w+)", script)]
    assert len(monitoring) == 8
    assert len(most) == 12 + 6 + 2
    free_m = ALLOCATABLE_M - DAEMONS_M - exporter_m
    nodes = {name: int(variables()[name]["default"]) for name in ("node_count", "max_nodes")}
    assert fit(least + monitoring, nodes["node_count"], free_m), "at rest"
    assert fit(most + monitoring, nodes["max_nodes"], free_m), "under load, in the middle of a rollout"


def test_the_token_is_sensitive_and_has_no_default() -> None:
    token = variables()["digitalocean_token"]
    assert token["sensitive"] is True
    assert token["default"] in (None, "null")
    assert "dop_v1" not in "".join(path.read_text() for path in TERRAFORM.glob("*.tf*"))


def test_the_example_leaves_the_version_to_the_environment() -> None:
    """Slugs are withdrawn, and one copied into terraform.tfvars wins over TF_VAR_kubernetes_version."""
    example = (TERRAFORM / "terraform.tfvars.example").read_text()
    assert not re.search(r"^\s*kubernetes_version", example, flags=re.MULTILINE)
    assert re.search(r"^# kubernetes_version", example, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The variables alone, so that terraform evaluates their rules without any provider."""
    if shutil.which("terraform") is None:
        pytest.skip("terraform is not here")
    folder = tmp_path_factory.mktemp("terraform")
    shutil.copy(TERRAFORM / "variables.tf", folder)
    # A variable's rules are evaluated when it is used.
    uses = "\n".join(
        f'output "{name}" {{\n  value     = var.{name}\n  sensitive = true\n}}' for name in variables()
    )
    (folder / "uses.tf").write_text(uses)
    assert plan(folder, init=True).returncode == 0
    return folder


def terraform(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TF_CLI_CONFIG_FILE": os.devnull, "TF_IN_AUTOMATION": "1"}
    return subprocess.run(
        ["terraform", f"-chdir={folder}", *words],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip


def plan(folder: Path, *values: str, init: bool = False) -> subprocess.CompletedProcess[str]:
    words = ["init", "-backend=false"] if init else ["plan", *(f"-var={value}" for value in values)]
    return terraform(folder, *words, "-input=false", "-no-color")


def test_the_defaults_are_accepted(workspace: Path) -> None:
    done = plan(workspace)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "value",
    [
        "cluster_name=Bad_Name", "kubernetes_version=1.32", "region=Singapore", "maintenance_day=Sunday",
        "maintenance_start_time=24:00", "node_size=big", "node_count=0", "node_count=2.5", "node_count=8",
        "max_nodes=1", "max_nodes=2.5", "max_nodes=51",
        "registry_tier=gold", "registry_name=A", 'tags=["with space"]', "digitalocean_token=short",
        'inference_pool={"size":"c-4","min_nodes":0,"max_nodes":2}',
        'inference_pool={"size":"c-4","min_nodes":3,"max_nodes":2}',
        'inference_pool={"size":"c-4","min_nodes":1,"max_nodes":2.5}',
        'inference_pool={"size":"big","min_nodes":1,"max_nodes":2}',
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(workspace: Path, value: str) -> None:
    done = plan(workspace, value)
    assert done.returncode == 1
    assert value.split("=")[0] in done.stderr


@pytest.mark.parametrize(
    "value",
    [
        'inference_pool={"size":"c-4","min_nodes":1,"max_nodes":4}', "node_count=5", "registry_name=my-asr",
        "node_size=c-4", "node_size=g-2vcpu-8gb", "node_size=s-4vcpu-8gb-amd", "max_nodes=2",
        "node_size=gpu-h100x1-80gb", "node_size=so1_5-2vcpu-16gb", "connect_registry=true",
    ],
)  # fmt: skip
def test_a_right_value_is_accepted(workspace: Path, value: str) -> None:
    done = plan(workspace, value)
    assert done.returncode == 0, done.stderr


def test_a_registry_is_made_or_the_accounts_own_is_connected(workspace: Path) -> None:
    """An account has one: with registry_name only, who has one already could not connect it."""
    assert re.search(
        r"registry_integration\s+= var.registry_name != null \|\| var.connect_registry\n",
        (TERRAFORM / "main.tf").read_text(),
    )
    done = plan(workspace, "connect_registry=true", "registry_name=my-asr")
    assert done.returncode == 1
    assert "connect_registry" in done.stderr


REPLACED = """
variable "size" { default = "small" }
variable "registries" { default = 1 }
resource "terraform_data" "cluster" {
  input            = "a}b\\"c"
  triggers_replace = [var.size]
}
resource "terraform_data" "registry" {
  count = var.registries
  input = var.size
}
"""


def test_what_a_plan_destroys_is_read_as_terraform_writes_it(tmp_path: Path) -> None:
    """k8s/setup.sh refuses by this; the resource is the one that Terraform brings along."""
    if shutil.which("terraform") is None:
        pytest.skip("terraform is not here")
    (tmp_path / "main.tf").write_text(REPLACED)
    for words in (["init", "-input=false"], ["apply", "-input=false", "-auto-approve"]):
        done = terraform(tmp_path, *words)
        assert done.returncode == 0, done.stderr
    for values, expected in (
        (["registries=1"], []),
        (["size=large", "registries=0"], ["terraform_data.cluster", "terraform_data.registry[0]"]),
    ):
        given = [f"-var={value}" for value in values]
        assert terraform(tmp_path, "plan", "-input=false", f"-out={tmp_path}/saved", *given).returncode == 0
        shown = terraform(tmp_path, "show", "-json", f"{tmp_path}/saved").stdout
        for types, found in ((["other", "terraform_data"], expected), (["data", "other"], [])):
            done = subprocess.run(
                ["bash", "-c", '. "$0"; destroyed "$@"', ROOT / "k8s/lib.sh", *types],
                input=shown, capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert sorted(done.stdout.split()) == found
