"""k8s/setup.sh, teardown.sh and monitoring-setup.sh to their ends, with tools that only remember."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from api.keys import ApiKey, find_key
from tests.infra.render import ROOT, kustomize

# Every tool notes its call. What it knows of the world are files in $WORLD.
HEAD = """#!/bin/bash
echo "${0##*/} $*" >>"$WORLD/calls"
line="$*"
"""
TERRAFORM = """case $line in
  *' output '*) [ ! -e "$WORLD/backend-away" ] || { echo 'Error: no backend' >&2; exit 1; } ;;&
  *'output -json'*)
    [ ! -e "$WORLD/outputs" ] || what='"cluster_id": {}, "kubeconfig_path": {}'
    echo "{$what}" ;;
  *'output -raw kubeconfig_path'*) printf %s "$WORLD/kubeconfig" ;;
  *'output -raw cluster_id'*) printf the-cluster ;;
  *'state pull'*) cat "$WORLD/state" 2>/dev/null || true ;;
  *'show -json'*) cat "$WORLD/plan" 2>/dev/null || echo '{"format_version":"1.2"}' ;;
esac
"""
DOCTL = """case $line in
  *'options versions'*) for slug in $OFFERED; do echo "$slug"; sleep 0.05; done ;;
  *'kubeconfig show the-cluster'*) echo fresh ;;
esac
"""
# The API server takes nobody but the owner of a fresh kubeconfig.
KUBECTL = """case $line in
  kustomize*) echo 'kind: Deployment'; cat "$WORLD/images" 2>/dev/null; exit 0 ;;
  create*) cat >/dev/null; echo 'kind: Secret'; exit ;;
  'label --local'* | 'annotate --local'*) cat; exit ;;
esac
[ "$(cat "$WORLD/kubeconfig")" = fresh ] || { echo 'error: You must be logged in to the server' >&2; exit 1; }
case $line in
  *'config view'*) echo https://api.example ;;
  *'get namespace '*)
    name=${line##*get namespace } name=${name%% *}
    cat "$WORLD/namespace-$name" 2>/dev/null; exit 0 ;;
  *'apply -f -'*) cat >/dev/null ;;
  *' get '*) [ ! -e "$WORLD/server-away" ] || { echo 'no route to host' >&2; exit 1; } ;;&
  *'get secret'*) [ ! -e "$WORLD/keys" ] || echo secret ;;
  *'create -f -'*) cat >>"$WORLD/created" ;;
  *'get apiservice'*) [ ! -e "$WORLD/metrics-api" ] || echo apiservice ;;
esac
"""
HELM = """case $1 in
  list)
    [ ! -e "$WORLD/server-away" ] || { echo 'no route to host' >&2; exit 1; }
    [[ $line =~ --filter\\ \\^([a-z-]+) ]]; name=${BASH_REMATCH[1]}
    [[ $line != *'--selector app.kubernetes.io/part-of=asr'* ]] || [ ! -e "$WORLD/foreign-$name" ] || exit 0
    [ ! -e "$WORLD/pending-$name" ] || { echo "$name"; exit 0; }
    [[ $line != *--deployed* ]] || [ ! -e "$WORLD/release-$name" ] || echo "$name" ;;
  rollback) [ -e "$WORLD/release-$2" ] || exit 1; rm "$WORLD/pending-$2" ;;
  uninstall) rm -f "$WORLD/pending-$2" "$WORLD/release-$2" ;;
  upgrade) [ ! -e "$WORLD/pending-$3" ] || { echo 'another operation is in progress' >&2; exit 1; } ;;
esac
"""
NEWEST, DEFAULT = "1.37.1-do.0", "1.32.2-do.0"


class World:
    """A copy of the scripts, and an account with whatever cluster the test makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("k8s", "monitoring"):
            shutil.copytree(ROOT / name, folder / name)
        (folder / "terraform").mkdir()
        for path in (ROOT / "terraform").glob("*.tf"):
            shutil.copy(path, folder / "terraform")
        (folder / "bin").mkdir()
        for name, body in (("terraform", TERRAFORM), ("doctl", DOCTL), ("kubectl", KUBECTL), ("helm", HELM)):
            tool = folder / "bin" / name
            tool.write_text(HEAD + body)
            tool.chmod(0o755)
        self.kubeconfig = folder / "kubeconfig"

    def has_cluster(self, kubeconfig: str = "fresh") -> None:
        (self.folder / "outputs").touch()
        (self.folder / "state").write_text('"mode": "managed", "type": "digitalocean_kubernetes_cluster"')
        self.kubeconfig.write_text(kubeconfig)

    def run(
        self, script: str, *arguments: str, cwd: Path | None = None, answer: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.folder / "k8s" / script, *arguments],
            capture_output=True, text=True, check=False, input=answer, cwd=cwd,
            env={
                **{key: value for key, value in os.environ.items() if not key.startswith(("TF_", "ASR_"))},
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "WORLD": str(self.folder),
                "DIGITALOCEAN_TOKEN": "x" * 32, "OFFERED": f"{NEWEST} {DEFAULT}", **environment,
            },
        )  # fmt: skip

    def calls(self, start: str) -> list[str]:
        made = self.folder / "calls"
        lines = made.read_text().splitlines() if made.exists() else []
        return [line for line in lines if line.startswith(start)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_half_made_cluster_is_destroyed_and_not_forgotten(world: World) -> None:
    """An apply that fails leaves a registry or a pool in the state, but no output."""
    (world.folder / "state").write_text('"mode": "managed", "type": "digitalocean_container_registry"')
    done = world.run("teardown.sh", "--yes")
    assert done.returncode == 0, done.stderr
    assert "nothing is left to delete" not in done.stdout
    assert world.calls("terraform -chdir=terraform destroy")
    assert not world.calls("kubectl")


def test_without_a_state_there_is_nothing_to_destroy(world: World) -> None:
    done = world.run("teardown.sh", "--yes")
    assert done.returncode == 0, done.stderr
    assert "nothing is left to delete" in done.stdout
    assert not world.calls("terraform -chdir=terraform destroy")


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("teardown.sh", ("--yes",)), ("setup.sh", ("--skip-terraform",))],
)
def test_a_kubeconfig_that_has_ended_is_fetched_again(
    world: World, script: str, arguments: tuple[str, ...]
) -> None:
    """DigitalOcean's credentials last seven days."""
    world.has_cluster(kubeconfig="expired")
    done = world.run(script, *arguments)
    assert done.returncode == 0, done.stderr
    assert world.kubeconfig.read_text() == "fresh\n"
    assert world.kubeconfig.stat().st_mode & 0o777 == 0o600
    assert world.calls("terraform -chdir=terraform destroy" if script == "teardown.sh" else "kubectl")


def test_a_kubeconfig_that_works_is_kept(world: World) -> None:
    world.has_cluster()
    assert world.run("setup.sh", "--skip-terraform").returncode == 0
    assert not world.calls("doctl kubernetes cluster kubeconfig")


def test_a_version_that_is_offered_is_found_wherever_it_stands_in_the_list(world: World) -> None:
    """`grep -q` leaves at the first match, and doctl would then end by SIGPIPE."""
    world.has_cluster()
    (world.folder / "state").unlink()
    done = world.run("setup.sh", "--yes", TF_VAR_kubernetes_version=NEWEST)
    assert done.returncode == 0, done.stderr
    assert world.calls("terraform -chdir=terraform apply")


def test_the_version_in_the_file_of_variables_counts_as_it_does_for_terraform(world: World) -> None:
    (world.folder / "terraform/terraform.tfvars").write_text('kubernetes_version = "1.30.1-do.0" # old\n')
    done = world.run("setup.sh", "--yes", TF_VAR_kubernetes_version=NEWEST)
    assert done.returncode == 1
    assert "does not offer 1.30.1-do.0" in done.stderr
    assert "set kubernetes_version in terraform/terraform.tfvars" in done.stderr


def test_a_withdrawn_version_is_no_matter_for_a_cluster_that_exists(world: World) -> None:
    world.has_cluster()
    done = world.run("setup.sh", "--yes", OFFERED=NEWEST)
    assert done.returncode == 0, done.stderr
    (world.folder / "state").unlink()
    done = world.run("setup.sh", "--yes", OFFERED=NEWEST)
    assert f"does not offer {DEFAULT} any more; export TF_VAR_kubernetes_version" in done.stderr


def changes(**actions: list[str]) -> str:
    """Resource changes as `terraform show -json` prints them."""
    listed = [
        {
            "address": f"digitalocean_{kind}.this", "mode": "managed", "type": f"digitalocean_{kind}",
            "change": {"actions": action, "before": {"node_pool": [{"size": "a{}b"}]}},
        }
        for kind, action in actions.items()
    ]  # fmt: skip
    return json.dumps(listed, separators=(",", ":"))


@pytest.mark.parametrize(
    ("actions", "named"),
    [
        (
            {"kubernetes_cluster": ["delete", "create"], "kubernetes_node_pool": ["delete"]},
            ["kubernetes_cluster"],
        ),
        ({"kubernetes_cluster": ["create", "delete"]}, ["kubernetes_cluster"]),
        ({"kubernetes_cluster": ["update"], "container_registry": ["delete"]}, ["container_registry"]),
        (
            {"kubernetes_cluster": ["delete"], "container_registry": ["delete", "create"]},
            ["kubernetes_cluster", "container_registry"],
        ),
        ({"kubernetes_cluster": ["update"], "kubernetes_node_pool": ["delete", "create"]}, []),
        ({"kubernetes_cluster": ["create"], "container_registry": ["no-op"]}, []),
    ],
)  # fmt: skip
def test_no_plan_that_destroys_the_cluster_or_the_registry_is_applied(
    world: World, actions: dict[str, list[str]], named: list[str]
) -> None:
    """Another node_size or region replaces the cluster, its volumes and address; --yes does not mean that."""
    world.has_cluster()
    by_hand = changes(kubernetes_cluster=["delete"])  # no doing of the plan, which makes it again
    plan = f'{{"format_version":"1.2","resource_drift":{by_hand},"resource_changes":{changes(**actions)}}}'
    (world.folder / "plan").write_text(plan)
    done = world.run("setup.sh", "--yes")
    assert done.returncode == (1 if named else 0), done.stderr
    assert bool(world.calls("terraform -chdir=terraform apply")) != bool(named)
    if named:
        assert f"destroys {' and '.join(f'digitalocean_{kind}.this' for kind in named)}, " in done.stderr
        assert "inference_pool" in done.stderr
        assert "k8s/teardown.sh first" in done.stderr


def test_a_plan_that_cannot_be_read_is_not_applied(world: World) -> None:
    world.has_cluster()
    (world.folder / "plan").write_text("Terraform will perform the following actions")
    done = world.run("setup.sh", "--yes")
    assert done.returncode == 1
    assert "cannot read what the plan would destroy" in done.stderr
    assert not world.calls("terraform -chdir=terraform apply")


def test_images_that_no_node_can_pull_are_refused_before_anything_costs_money(world: World) -> None:
    (world.folder / "images").write_text("        image: asr-api:0.1.0\n        image: asr-ui:0.1.0\n")
    done = world.run("setup.sh", "--yes")
    assert done.returncode == 1
    assert "no node can pull asr-api:0.1.0 asr-ui:0.1.0: name --registry" in done.stderr
    assert not world.calls("terraform")
    world.has_cluster()
    assert world.run("setup.sh", "--yes", "--registry", "r.example/asr").returncode == 0
    (world.folder / "images").write_text("        image: r.example/asr/asr-api:0.1.0\n")
    assert world.run("setup.sh", "--yes").returncode == 0, "an overlay may name the registry itself"
    (world.folder / "images").write_text("        image: asr-api:0.1.0\n")
    done = world.run("setup.sh", "--kubeconfig", str(world.kubeconfig))
    assert done.returncode == 0, "another cluster may have the images already"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders the manifests; it is not here")
@pytest.mark.parametrize(
    ("registry", "secret"),
    [
        ("registry.digitalocean.com/my-asr", "my-asr"), ("registry.digitalocean.com/my-asr/", "my-asr"),
        ("registry.digitalocean.com/my-asr/team", "my-asr"), ("ghcr.io/my/asr", None), ("", None),
        ("registry.digitalocean.com.example.org/my-asr", None),
    ],
)  # fmt: skip
def test_pods_pull_from_digitaloceans_registry_with_the_secret_that_it_puts_there(
    world: World, registry: str, secret: str | None
) -> None:
    """DigitalOcean names it in the service account `default` only."""
    world.has_cluster()
    named = ("--registry", registry) if registry else ()
    done = world.run("setup.sh", "--kubeconfig", str(world.kubeconfig), "--tag", "1.2.3", *named)
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(kustomize(world.folder / "build/k8s-render")))
    accounts = {
        item["metadata"]["name"]: item.get("imagePullSecrets")
        for item in objects
        if item["kind"] == "ServiceAccount"
    }
    pods = [item["spec"]["template"]["spec"] for item in objects if item["kind"] == "Deployment"]
    assert set(accounts) == {pod["serviceAccountName"] for pod in pods}
    assert all(secrets == ([{"name": secret}] if secret else None) for secrets in accounts.values())
    prefix = f"{registry.rstrip('/')}/" if registry else ""
    assert {pod["containers"][0]["image"] for pod in pods} == {
        f"{prefix}asr-api:1.2.3",
        f"{prefix}asr-ui:1.2.3",
    }


@pytest.mark.parametrize("deployed_before", [True, False])
def test_a_chart_whose_installation_was_killed_does_not_block_the_next_run(
    world: World, deployed_before: bool
) -> None:
    world.has_cluster()
    (world.folder / "pending-jaeger").touch()
    if deployed_before:
        (world.folder / "release-jaeger").touch()
    done = world.run("monitoring-setup.sh", "--kubeconfig", str(world.kubeconfig))
    assert done.returncode == 0, done.stderr
    assert len(world.calls("helm rollback jaeger")) == 1
    assert bool(world.calls("helm uninstall jaeger")) != deployed_before
    assert world.calls("helm upgrade --install jaeger")


@pytest.mark.parametrize(
    ("there", "installed"),
    [((), True), (("metrics-api",), False), (("metrics-api", "release-metrics-server"), True)],
    ids=["none", "another one's", "ours"],
)
def test_the_autoscalers_get_a_metrics_api_where_the_cluster_has_none(
    world: World, there: tuple[str, ...], installed: bool
) -> None:
    """DigitalOcean's clusters come without metrics-server, and the autoscalers read CPU from nothing else."""
    world.kubeconfig.write_text("fresh")
    for name in there:
        (world.folder / name).touch()
    done = world.run("monitoring-setup.sh", "--kubeconfig", str(world.kubeconfig))
    assert done.returncode == 0, done.stderr
    assert bool(world.calls("helm upgrade --install metrics-server")) == installed
    assert len(world.calls("helm upgrade")) == 3 + installed


@pytest.mark.parametrize(
    ("script", "arguments"), [("teardown.sh", ()), ("setup.sh", ("--registry", "r.example"))]
)
def test_without_a_terminal_it_says_how_not_to_be_asked(
    world: World, script: str, arguments: tuple[str, ...]
) -> None:
    world.has_cluster()
    done = world.run(script, *arguments)
    assert done.returncode == 1
    assert "no terminal to ask on; use --yes" in done.stderr
    assert not world.calls("terraform -chdir=terraform apply")
    assert not world.calls("terraform -chdir=terraform destroy")


@pytest.mark.parametrize(
    ("script", "arguments"), [("teardown.sh", ("--yes",)), ("setup.sh", ("--skip-terraform",))]
)
def test_a_state_that_cannot_be_read_is_no_missing_cluster(
    world: World, script: str, arguments: tuple[str, ...]
) -> None:
    """Destroyed before its Services and volumes, a cluster leaves what goes on costing money."""
    world.has_cluster()
    (world.folder / "backend-away").touch()
    done = world.run(script, *arguments)
    assert done.returncode == 1
    assert "Error: no backend" in done.stderr
    assert "no cluster yet" not in done.stderr
    assert not world.calls("terraform -chdir=terraform destroy")


@pytest.mark.parametrize(
    ("script", "asked"),
    [("teardown.sh", "release"), ("setup.sh", "secret"), ("monitoring-setup.sh", "release")],
)
def test_a_server_that_does_not_answer_has_not_said_no(world: World, script: str, asked: str) -> None:
    """Taken for "not there", a release would be left to be deleted with its namespace, pods and all."""
    world.has_cluster()
    (world.folder / "server-away").touch()
    only = ("--only", "monitoring", "--yes") if script == "teardown.sh" else ()
    done = world.run(script, "--kubeconfig", str(world.kubeconfig), *only)
    assert done.returncode == 1
    assert "does not say" in done.stderr
    assert asked in done.stderr
    assert not world.calls("kubectl create")
    assert not [call for call in world.calls("kubectl") if " delete " in call]


def test_relative_paths_are_those_of_the_caller(world: World) -> None:
    world.has_cluster()
    folder = world.folder / "elsewhere"
    shutil.copytree(world.folder / "k8s/overlays/dev", folder / "mine")
    world.kubeconfig.rename(folder / "config")
    world.kubeconfig.write_text("fresh")
    done = world.run("setup.sh", "--kubeconfig", "config", "--overlay", "mine", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [call for call in world.calls("kubectl") if f"--kubeconfig {folder}/config " in call]
    assert f"- {os.path.relpath(folder / 'mine', world.folder / 'build/k8s-render')}" in (
        world.folder / "build/k8s-render/kustomization.yaml"
    ).read_text().replace("  - ", "- ")


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("setup.sh", ("--skip-terraform",)), ("monitoring-setup.sh", ()), ("teardown.sh", ("--yes",)),
        ("teardown.sh", ("--yes", "--only", "app")),
    ],
)  # fmt: skip
def test_every_script_asks_the_cluster_of_terraform_and_names_it(
    world: World, script: str, arguments: tuple[str, ...]
) -> None:
    """Not whichever kubectl's context happens to be at."""
    world.has_cluster()
    done = world.run(script, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"cluster: https://api.example ({world.kubeconfig})" in done.stdout
    asking = [
        call for call in world.calls("kubectl") if not re.match("kubectl (kustomize|create|label|anno)", call)
    ]
    assert asking
    assert all(f"--kubeconfig {world.kubeconfig} " in call for call in asking)
    assert all(f"--kubeconfig {world.kubeconfig}" in call for call in world.calls("helm"))


def test_a_question_names_the_cluster(world: World) -> None:
    world.has_cluster()
    done = world.run("teardown.sh", answer="y\n")
    assert done.returncode == 0, done.stderr
    assert "cluster: https://api.example" in done.stdout
    assert world.calls("terraform -chdir=terraform destroy")


@pytest.mark.parametrize("script", ["setup.sh", "monitoring-setup.sh"])
@pytest.mark.parametrize("name", ["asr-system", "monitoring", "observability"])
def test_a_namespace_of_somebody_else_is_not_taken_over(world: World, script: str, name: str) -> None:
    world.has_cluster()
    (world.folder / f"namespace-{name}").write_text(f"{name}=")
    done = world.run(script, "--kubeconfig", str(world.kubeconfig))
    assert done.returncode == 1
    assert f"has a namespace {name} that is not this project's" in done.stderr
    assert not [call for call in world.calls("kubectl") if "apply" in call]
    (world.folder / f"namespace-{name}").write_text(f"{name}=asr")
    assert world.run(script, "--kubeconfig", str(world.kubeconfig)).returncode == 0


def test_a_release_of_somebody_else_is_not_upgraded(world: World) -> None:
    world.has_cluster()
    for name in ("release-jaeger", "foreign-jaeger"):
        (world.folder / name).touch()
    done = world.run("monitoring-setup.sh")
    assert done.returncode == 1
    assert "has a release jaeger in observability that is not this project's" in done.stderr
    assert not world.calls("helm upgrade")
    (world.folder / "foreign-jaeger").unlink()
    assert world.run("monitoring-setup.sh").returncode == 0
    assert all("--labels app.kubernetes.io/part-of=asr " in call for call in world.calls("helm upgrade"))


def test_teardown_leaves_what_is_somebody_elses(world: World) -> None:
    world.has_cluster()
    (world.folder / "namespace-asr-system").write_text("asr-system=theirs")
    for name in ("release-jaeger", "foreign-jaeger", "release-kube-prometheus-stack"):
        (world.folder / name).touch()
    done = world.run("teardown.sh", "--yes", "--kubeconfig", str(world.kubeconfig))
    assert done.returncode == 0, done.stderr
    assert "namespace asr-system is not this project's" in done.stdout
    assert "release jaeger in observability is not this project's" in done.stdout
    deleted = [call.split(" delete ")[1] for call in world.calls("kubectl") if " delete " in call]
    assert [each.split(" --")[0] for each in deleted] == ["namespace monitoring"]
    assert [call.split()[2] for call in world.calls("helm uninstall")] == ["kube-prometheus-stack"]
    done = world.run("teardown.sh", "--yes")
    assert done.returncode == 1
    assert "the cluster has what is not this project's" in done.stderr
    assert not world.calls("terraform -chdir=terraform destroy")


def test_a_fresh_cluster_accepts_the_key_of_whoever_deploys(world: World) -> None:
    """Jenkins asks the service with it straight afterwards, and would roll a first deployment back."""
    world.has_cluster()
    secret = "of-the-one-who-deploys"
    arguments = ("--kubeconfig", str(world.kubeconfig))
    done = world.run("setup.sh", *arguments, ASR_API_KEY=secret)
    assert done.returncode == 0, done.stderr
    data = yaml.safe_load((world.folder / "created").read_text())["data"]
    keys = [ApiKey.parse(line) for line in base64.b64decode(data["keys"]).decode().splitlines()]
    for value, name in ((secret, "caller"), (base64.b64decode(data["ui-key"]).decode(), "operator")):
        found = find_key(keys, value)
        assert found is not None
        assert found.name == name
    assert secret not in base64.b64decode(data["keys"]).decode()
    assert "shorter than 16" in world.run("setup.sh", *arguments, ASR_API_KEY="short").stderr
    (world.folder / "keys").touch()
    assert world.run("setup.sh", *arguments, ASR_API_KEY="short").returncode == 0, "keys that are there stay"
