"""k8s/setup.sh and k8s/rollback.sh with a kubectl that only remembers: only what was changed is undone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.infra.render import ROOT

# Deployments are files NAME with "UID REVISION", and history-NAME has the revisions that there are. An apply
# counts up those in FAKE_CHANGES. What is gone back to gets a new number, as on Kubernetes.
KUBECTL = """#!/bin/bash
cd "$FAKE_CLUSTER" || exit
line="$*"
echo "$line" >>calls
count_up() {
  read -r uid revision <"deployment-$1"
  echo "$uid $((revision + 1))" >"deployment-$1"
  echo "$((revision + 1))" >>"history-$1"
}
case $line in
  *'get namespace asr-system '*metadata.uid*) cat namespace 2>/dev/null; exit 0 ;;
  *'get service'*)
    [[ -z $FAKE_UNTOLD || $line != *"$FAKE_UNTOLD"* ]] || exit 1
    [[ $line != *spec.type* || -z $FAKE_UNTOLD ]] || echo LoadBalancer ;;
  *'get deployment '*)
    [ -z "$FAKE_SILENT" ] || exit 1
    name=${line##*get deployment }; cat "deployment-${name%% *}" 2>/dev/null; exit 0 ;;
  *'apply -f -'*)
    [[ $(cat) == *Deployment* ]] || exit 0
    for name in $FAKE_CHANGES; do count_up "$name"; done
    exit "${FAKE_STATUS:-0}" ;;
  *'create -f -'*) cat >/dev/null ;;
  *'config view'*) echo https://api.example ;;
  *kustomize*namespaces*) echo 'kind: Namespace' ;;
  *kustomize*) echo 'kind: Deployment' ;;
  *'get pods'*) [ -e unschedulable ] && echo Unschedulable; exit 0 ;;
  *'rollout undo'*)
    name=${line##*deployment/} name=${name%% *} wanted=${line##*--to-revision=}
    [ "$name" != "$FAKE_NO_UNDO" ] || exit 1
    grep -qx "$wanted" "history-$name" || { echo "unable to find specified revision $wanted" >&2; exit 1; }
    sed -i "/^$wanted\\$/d" "history-$name"
    count_up "$name"
    echo "${line#*rollout undo }" >>undone ;;
  *'rollout status'*--watch=false*) [ -e stuck ] || echo successfully rolled out ;;
  *'rollout status'*)
    name=${line##*deployment/}; echo "${name%% *}" >>waited
    [ -z "$FAKE_STUCK" ] || { touch stuck; exit 1; }
    rm -f stuck ;;
esac
"""


class Cluster:
    """A fake cluster in which asr-api is at revision 7 and asr-ui at revision 4."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "bin/kubectl").write_text(KUBECTL)
        (folder / "bin/kubectl").chmod(0o755)
        (folder / "config").touch()
        (folder / "namespace").write_text("uid-asr-system")
        for name, revision in (("asr-api", 7), ("asr-ui", 4)):
            (folder / f"deployment-{name}").write_text(f"uid-{name} {revision}\n")
            (folder / f"history-{name}").write_text(f"{revision}\n")

    def make(self, target: str, **environment: str) -> subprocess.CompletedProcess[str]:
        overlay = environment.pop("OVERLAY", "production")
        kubeconfig = environment.pop("KUBECONFIG", f"{self.folder}/config")
        return subprocess.run(
            ["make", target, f"KUBECONFIG={kubeconfig}", f"OVERLAY={overlay}"],
            cwd=ROOT, capture_output=True, text=True, check=False,
            env={
                **os.environ, "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "FAKE_CLUSTER": str(self.folder), "FAKE_CHANGES": "",
                "REVISIONS_FILE": str(self.folder / "revisions"), **environment,
            },
        )  # fmt: skip

    def undone(self) -> list[str]:
        return self.lines("undone")

    def lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_a_rollback_undoes_only_the_deployment_that_was_changed(cluster: Cluster) -> None:
    assert cluster.make("deploy-k8s", FAKE_CHANGES="asr-api", FAKE_STATUS="1").returncode != 0
    done = cluster.make("rollback-k8s")
    assert done.returncode == 0, done.stderr
    assert cluster.undone() == ["deployment/asr-api --to-revision=7"]
    assert "asr-ui: still at revision 4" in done.stdout
    cluster.make("rollback-k8s")
    assert len(cluster.undone()) == 1, "a second rollback has nothing to undo"


def test_a_failure_before_the_apply_undoes_nothing_of_an_earlier_deployment(cluster: Cluster) -> None:
    cluster.make("deploy-k8s", FAKE_CHANGES="asr-api asr-ui")
    assert cluster.make("deploy-k8s", OVERLAY="prod").returncode != 0
    done = cluster.make("rollback-k8s")
    assert done.returncode == 0, done.stderr
    assert "nothing to undo" in done.stdout
    assert cluster.undone() == []


def test_a_good_version_that_fails_the_smoke_test_is_undone(cluster: Cluster) -> None:
    done = cluster.make("deploy-k8s", FAKE_CHANGES="asr-api asr-ui")
    assert done.returncode == 0, done.stderr
    cluster.make("rollback-k8s")
    assert cluster.undone() == ["deployment/asr-api --to-revision=7", "deployment/asr-ui --to-revision=4"]


@pytest.mark.parametrize("full", [True, False])
def test_a_rollback_says_what_to_do_where_no_node_has_room_for_its_first_pod(
    cluster: Cluster, full: bool
) -> None:
    """With maxUnavailable 0 it starts a pod before it takes one away, and would wait without a word."""
    cluster.make("deploy-k8s", FAKE_CHANGES="asr-api")
    if full:
        (cluster.folder / "unschedulable").touch()
    done = cluster.make("rollback-k8s")
    assert done.returncode == 0, done.stderr
    assert cluster.undone() == ["deployment/asr-api --to-revision=7"]
    assert ("docs/runbooks/AsrReplicaMissing.md" in done.stdout) == full
    assert (ROOT / "docs/runbooks/AsrReplicaMissing.md").read_text().count('"maxReplicas": N') == 1


@pytest.mark.parametrize("trouble", [{"FAKE_NO_UNDO": "asr-ui"}, {"FAKE_STUCK": "1"}])
def test_a_rollback_that_broke_off_can_be_repeated(cluster: Cluster, trouble: dict[str, str]) -> None:
    """What was undone has another number by then, and is only waited for."""
    cluster.make("deploy-k8s", FAKE_CHANGES="asr-api asr-ui")
    assert cluster.make("rollback-k8s", **trouble).returncode != 0
    (cluster.folder / "waited").unlink()
    done = cluster.make("rollback-k8s")
    assert done.returncode == 0, done.stderr
    assert cluster.undone() == ["deployment/asr-api --to-revision=7", "deployment/asr-ui --to-revision=4"]
    assert cluster.lines("waited") == ["asr-api", "asr-ui"]
    assert "nothing to undo" in cluster.make("rollback-k8s").stdout


def test_a_first_deployment_has_no_revision_to_go_back_to(cluster: Cluster) -> None:
    """As with docker/deploy.sh, that is a failure: what was to be taken away still runs."""
    for name in ("asr-api", "asr-ui"):
        (cluster.folder / f"deployment-{name}").unlink()
    cluster.make("deploy-k8s")
    done = cluster.make("rollback-k8s")
    assert done.returncode != 0
    assert "first deployment" in done.stderr
    assert "k8s/teardown.sh --only app" in done.stderr
    assert cluster.undone() == []


def test_a_cluster_that_does_not_answer_makes_no_record_of_a_first_deployment(cluster: Cluster) -> None:
    assert cluster.make("deploy-k8s", FAKE_SILENT="1").returncode != 0
    done = cluster.make("rollback-k8s")
    assert done.returncode == 0, done.stderr
    assert "applied nothing" in done.stdout


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_asking_setup_for_help_forgets_no_record(tmp_path: Path, option: str) -> None:
    record = tmp_path / "revisions"
    record.write_text("cluster uid /config\nasr-api uid-asr-api 7\ncompleted\n")
    environment = {**os.environ, "REVISIONS_FILE": str(record)}
    subprocess.run([ROOT / "k8s/setup.sh", option], env=environment, capture_output=True, check=True)
    assert record.exists()


def test_a_rollback_goes_to_the_cluster_that_was_deployed_to(cluster: Cluster) -> None:
    cluster.make("deploy-k8s", FAKE_CHANGES="asr-api")
    (cluster.folder / "calls").unlink()
    done = cluster.make("rollback-k8s", KUBECONFIG="")
    assert done.returncode == 0, done.stderr
    assert f"cluster: https://api.example ({cluster.folder}/config)" in done.stdout
    assert cluster.undone() == ["deployment/asr-api --to-revision=7"]
    assert all(line.startswith(f"--kubeconfig {cluster.folder}/config ") for line in cluster.lines("calls"))


@pytest.mark.parametrize("gone", ["namespace", "deployment-asr-ui"])
def test_what_is_not_there_any_more_fails_a_rollback_and_keeps_its_record(
    cluster: Cluster, gone: str
) -> None:
    """Another cluster has an asr-system, or an asr-ui, of its own."""
    cluster.make("deploy-k8s", FAKE_CHANGES="asr-api asr-ui")
    moved = (cluster.folder / gone).read_text()
    (cluster.folder / gone).write_text("uid-another 3")
    done = cluster.make("rollback-k8s")
    assert done.returncode != 0
    assert "revisions is kept" in done.stderr
    (cluster.folder / gone).write_text(moved)
    assert cluster.make("rollback-k8s").returncode == 0
    assert cluster.undone() == ["deployment/asr-api --to-revision=7", "deployment/asr-ui --to-revision=4"]


def test_a_failed_deployment_that_is_repeated_keeps_the_way_back(cluster: Cluster) -> None:
    """The revision that is there by then is the bad one."""
    assert cluster.make("deploy-k8s", FAKE_CHANGES="asr-api", FAKE_STUCK="1").returncode != 0
    assert cluster.make("deploy-k8s", FAKE_CHANGES="asr-api", FAKE_STUCK="1").returncode != 0
    assert cluster.make("rollback-k8s").returncode == 0
    assert cluster.undone() == ["deployment/asr-api --to-revision=7"]


def test_a_first_deployment_that_failed_twice_is_still_the_first(cluster: Cluster) -> None:
    made = {name: (cluster.folder / name).read_text() for name in ("deployment-asr-api", "deployment-asr-ui")}
    for name in made:
        (cluster.folder / name).unlink()
    assert cluster.make("deploy-k8s", FAKE_STUCK="1").returncode != 0
    for name, text in made.items():
        (cluster.folder / name).write_text(text)
    assert cluster.make("deploy-k8s", FAKE_STUCK="1").returncode != 0
    assert "first deployment" in cluster.make("rollback-k8s").stderr


def test_a_rollout_that_came_through_after_all_is_what_the_next_one_goes_back_to(cluster: Cluster) -> None:
    assert cluster.make("deploy-k8s", FAKE_CHANGES="asr-api", FAKE_STUCK="1").returncode != 0
    (cluster.folder / "stuck").unlink()
    assert cluster.make("deploy-k8s", FAKE_CHANGES="asr-api", FAKE_STUCK="1").returncode != 0
    cluster.make("rollback-k8s")
    assert cluster.undone() == ["deployment/asr-api --to-revision=8"]


def test_after_a_rollback_that_stood_still_the_next_one_goes_back_to_what_it_brought(
    cluster: Cluster,
) -> None:
    cluster.make("deploy-k8s", FAKE_CHANGES="asr-api", FAKE_STUCK="1")
    assert cluster.make("rollback-k8s", FAKE_STUCK="1").returncode != 0
    assert cluster.make("deploy-k8s", FAKE_CHANGES="asr-api", FAKE_STUCK="1").returncode != 0
    cluster.make("rollback-k8s")
    assert cluster.undone() == [f"deployment/asr-api --to-revision={revision}" for revision in (7, 9)]


def test_a_wrong_option_forgets_no_record(cluster: Cluster) -> None:
    cluster.make("deploy-k8s", FAKE_CHANGES="asr-api")
    environment = {**os.environ, "REVISIONS_FILE": str(cluster.folder / "revisions")}
    done = subprocess.run(
        [ROOT / "k8s/setup.sh", "--frobnicate"], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert (cluster.folder / "revisions").exists()


@pytest.mark.parametrize(("untold", "said"), [("spec.type", "no answer"), ("loadBalancer", "no address yet")])
def test_an_address_that_is_not_told_fails_no_deployment(cluster: Cluster, untold: str, said: str) -> None:
    """Jenkins would roll back what runs."""
    config = str(cluster.folder / "config")
    environment = {
        **os.environ, "PATH": f"{cluster.folder / 'bin'}:{os.environ['PATH']}",
        "FAKE_CLUSTER": str(cluster.folder), "FAKE_UNTOLD": untold,
        "REVISIONS_FILE": str(cluster.folder / "revisions"),
    }  # fmt: skip
    done = subprocess.run(
        [ROOT / "k8s/setup.sh", "--kubeconfig", config, "--timeout", "1"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"asr-api: {said}" in done.stdout
