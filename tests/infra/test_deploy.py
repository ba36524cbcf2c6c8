"""docker/deploy.sh with a docker that only remembers: what runs after a deployment, a failure, a rollback."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.infra.render import ROOT

Done = subprocess.CompletedProcess[str]


class Machine:
    """One machine with the fake docker, a deployment state and nothing running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "deployed"
        (folder / "bin").mkdir()
        (folder / "bin/docker").symlink_to(ROOT / "tests/infra/fake_docker.sh")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("ASR_")}
        self.environment = {
            **inherited, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_DOCKER": str(folder),
            "ENV_FILE": "/nonexistent", "DEPLOY_STATE": str(self.state), "HEALTHY_TIMEOUT_S": "1",
            "REGISTRY": "", "REPLICAS": "2", "PARTS": "base,api,ui",
        }  # fmt: skip

    def run(self, *command: str, **environment: str) -> Done:
        return subprocess.run(
            command, cwd=ROOT, env=self.environment | environment, capture_output=True, text=True, check=False
        )

    def deploy(self, version: str, broken: str = "", **environment: str) -> Done:
        """``broken``: versions whose containers never get healthy."""
        ids = " ".join(f"sha256:asr-api:{tag}" for tag in broken.split())
        return self.run("docker/deploy.sh", "deploy", version, FAKE_BROKEN=ids, **environment)

    def rollback(self, **environment: str) -> Done:
        return self.run("docker/deploy.sh", "rollback", **environment)

    def up(self, version: str) -> None:
        """What `make up` leaves behind: containers, and no deployment state."""
        images = {"ASR_API_IMAGE": f"asr-api:{version}", "ASR_UI_IMAGE": f"asr-ui:{version}"}
        assert self.run("docker/compose.sh", "up", "--detach", "--scale", "api=2", **images).returncode == 0

    def ids(self, service: str = "api") -> list[str]:
        """Image id of each container of a service."""
        files = sorted((self.folder / "containers").glob(f"*-{service}"))
        return [file.read_text().splitlines()[1] for file in files]

    def images(self, service: str = "api") -> list[str]:
        """Image of each container of a service."""
        files = sorted((self.folder / "containers").glob(f"*-{service}"))
        return [file.read_text().splitlines()[0] for file in files]

    def calls(self, start: str) -> list[str]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(start)]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_rollback_brings_the_version_before(machine: Machine) -> None:
    for version in ("1", "2"):
        assert machine.deploy(version).returncode == 0
    assert machine.images() == ["asr-api:2"] * 2
    assert machine.images("ui") == ["asr-ui:2"]
    assert machine.rollback().returncode == 0
    assert machine.images() == ["asr-api:1"] * 2
    assert machine.images("ui") == ["asr-ui:1"]


def test_a_deployment_brings_a_changed_gateway_too(machine: Machine) -> None:
    """Its image or its configuration may be another one in this version."""
    for version in ("1", "2"):
        machine.deploy(version)
    assert [call for call in machine.calls("compose") if " gateway" in call and "--no-recreate" not in call]


def test_a_failed_deployment_goes_back_once_and_a_rollback_after_it_does_nothing(machine: Machine) -> None:
    for version in ("1", "2"):
        machine.deploy(version)
    failed = machine.deploy("3", broken="3")
    assert failed.returncode == 1
    assert "3 failed; going back to 2" in failed.stderr
    assert machine.images() == ["asr-api:2"] * 2
    after = machine.rollback()
    assert after.returncode == 0
    assert "nothing to roll back: 3 failed" in after.stdout
    assert machine.images() == ["asr-api:2"] * 2
    assert machine.deploy("4").returncode == 0
    assert machine.rollback().returncode == 0
    assert machine.images() == ["asr-api:2"] * 2, "the deployment after it can be rolled back again"


def test_a_rollback_finishes_what_going_back_could_not(machine: Machine) -> None:
    for version in ("1", "2"):
        machine.deploy(version)
    failed = machine.deploy("3", broken="2 3")
    assert failed.returncode == 1
    assert "going back to 2 failed too" in failed.stderr
    assert machine.rollback().returncode == 0
    assert machine.images() == ["asr-api:2"] * 2


@pytest.mark.parametrize("refused", ["stop", "rm", "compose --project-name asr -f"])
def test_a_command_that_fails_ends_the_deployment(machine: Machine, refused: str) -> None:
    machine.deploy("1")
    done = machine.deploy("2", FAKE_REFUSES=refused)
    assert done.returncode == 1
    assert "deployed 2" not in done.stdout
    assert (machine.state / "current").read_text() == "1\n"


def test_the_first_deployment_after_make_up_goes_back_to_what_ran(machine: Machine) -> None:
    machine.up("1")
    failed = machine.deploy("2", broken="2")
    assert failed.returncode == 1
    assert "2 failed; going back to 1" in failed.stderr
    assert machine.images() == ["asr-api:1"] * 2
    assert "1 is deployed" in machine.rollback().stdout
    assert machine.deploy("2").returncode == 0
    assert machine.rollback().returncode == 0
    assert machine.images() == ["asr-api:1"] * 2


def test_a_failure_on_an_empty_machine_says_that_there_is_nothing_to_go_back_to(machine: Machine) -> None:
    failed = machine.deploy("1", broken="1")
    assert failed.returncode == 1
    assert "no earlier version" in failed.stderr


def test_scaling_keeps_the_version_that_runs(machine: Machine) -> None:
    machine.up("1")
    assert machine.run("docker/deploy.sh", "scale", REPLICAS="3").returncode == 0
    assert machine.images() == ["asr-api:1"] * 3


def test_a_build_of_the_same_version_goes_back_to_the_build_before(machine: Machine) -> None:
    """Jenkins builds every commit under the version of pyproject.toml."""
    machine.up("1")
    for kind in ("api", "ui"):
        assert machine.run("docker", "tag", f"sha256:new-{kind}", f"asr-{kind}:1").returncode == 0
    failed = machine.run("docker/deploy.sh", "deploy", "1", FAKE_BROKEN="sha256:new-api")
    assert "1 failed; going back to 1-before" in failed.stderr
    assert machine.ids() == ["sha256:asr-api:1"] * 2
    assert machine.deploy("1").returncode == 0
    assert machine.ids() == ["sha256:new-api"] * 2
    assert machine.rollback().returncode == 0
    assert machine.ids() == ["sha256:asr-api:1"] * 2
    assert machine.ids("ui") == ["sha256:asr-ui:1"]


def test_a_restart_of_the_same_images_has_nothing_to_go_back_to(machine: Machine) -> None:
    machine.deploy("1")
    assert machine.deploy("1").returncode == 0
    assert machine.images() == ["asr-api:1"] * 2
    assert not (machine.state / "previous").exists()


def test_copies_of_configuration_stay_only_while_something_needs_them(
    machine: Machine, tmp_path: Path
) -> None:
    """A deployment from another commit brings another nginx.conf; a rollback takes the one before."""
    conf = tmp_path / "nginx.conf"

    def change(line: str) -> dict[str, str]:
        conf.write_text((ROOT / "docker/nginx/nginx.conf").read_text() + f"# {line}\n")
        return {"ASR_NGINX_CONF": str(conf)}

    def lines() -> set[str]:
        return {path.read_text().splitlines()[-1] for path in machine.state.glob("nginx.conf-*")}

    for version in ("1", "2", "2", "3"):
        assert machine.deploy(version, **change(version)).returncode == 0
    assert lines() == {"# 2", "# 3"}
    assert machine.deploy("4", broken="4", **change("4")).returncode == 1
    assert lines() == {"# 2", "# 3", "# 4"}, "nothing goes before the new version is healthy"
    mounted = machine.state / "nginx.conf-1"  # by a container that no deployment touches
    mounted.write_text("# mounted")
    (machine.state / "nginx.conf-1.new").write_text("a copy that was broken off")
    os.utime(mounted, (0, 0))
    (machine.folder / "containers/0001-jaeger").write_text(f"image\nid\nkeys\n{mounted}\n")
    assert machine.deploy("5", **change("5")).returncode == 0
    assert lines() == {"# mounted", "# 3", "# 5"}
    assert not list(machine.state.glob("*.new"))
    assert {path.name for path in machine.state.iterdir()} >= {"current", "previous"}


def test_going_back_brings_the_gateways_configuration_back_too(machine: Machine, tmp_path: Path) -> None:
    """Both ways run from the checkout of the version that was no good."""
    conf = tmp_path / "nginx.conf"

    def of(version: str) -> dict[str, str]:
        conf.write_text((ROOT / "docker/nginx/nginx.conf").read_text() + f"# {version}\n")
        return {"ASR_NGINX_CONF": str(conf)}

    def running() -> str:
        (file,) = (machine.folder / "containers").glob("*-gateway")
        return Path(file.read_text().splitlines()[3]).read_text().splitlines()[-1]

    for version in ("1", "2"):
        assert machine.deploy(version, **of(version)).returncode == 0
    assert running() == "# 2"
    assert machine.deploy("3", broken="3", **of("3")).returncode == 1
    assert running() == "# 2"
    assert machine.deploy("4", **of("4")).returncode == 0
    assert running() == "# 4"
    assert machine.rollback(**of("4")).returncode == 0
    assert running() == "# 2"
    assert machine.images() == ["asr-api:2"] * 2


def test_a_configuration_that_nginx_refuses_changes_nothing(machine: Machine) -> None:
    assert machine.deploy("1").returncode == 0
    before = machine.calls("stop")
    parts = " ".join(f"-f docker/compose.{part}.yml" for part in ("base", "api", "ui"))
    done = machine.deploy("2", FAKE_REFUSES=f"compose --project-name asr {parts} run")
    assert done.returncode == 1
    assert "nothing was changed" in done.stderr
    assert machine.calls("stop") == before
    assert machine.images() == ["asr-api:1"] * 2
    assert "nothing to roll back: 2 failed" in machine.rollback().stdout


def test_images_go_once_no_rollback_needs_them(machine: Machine) -> None:
    """Jenkins makes images of every commit."""
    for version in ("1", "2", "3"):
        assert machine.deploy(version).returncode == 0
    assert machine.calls("image rm") == ["image rm asr-api:1", "image rm asr-ui:1"]
    for needed in ("2", "3"):
        assert machine.run("docker/deploy.sh", "forget", needed).returncode == 0
    assert len(machine.calls("image rm")) == 2
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert machine.run("docker/deploy.sh", "forget", commit).returncode == 0
    names = [f"asr-{kind}:{tag}" for kind in ("api", "ui") for tag in (commit, commit[:12])]
    assert machine.calls("image rm")[2:] == [f"image rm {name}" for name in names]


def test_a_deployment_that_was_refused_is_no_reason_to_go_back(machine: Machine) -> None:
    """A pipeline asks for it whatever ended a deployment: what runs has nothing to do with this one."""
    for version in ("1", "2"):
        assert machine.deploy(version, ASR_API_KEYS="me:0123456789abcdef").returncode == 0
    assert machine.deploy("3").returncode == 1
    done = machine.run("docker/deploy.sh", "recover")
    assert (done.returncode, done.stdout) == (0, "no deployment broke off; 2 stays\n")
    assert machine.images() == ["asr-api:2"] * 2


def test_keys_that_are_asked_for_do_not_get_lost(machine: Machine, tmp_path: Path) -> None:
    """Jenkins deploys from a clean checkout, in which there is no .env."""
    keys = {"ASR_API_KEYS": "me:0123456789abcdef", "ASR_API_KEY": "0123456789abcdef"}
    for version in ("1", "2"):
        assert machine.deploy(version, **keys).returncode == 0
    before = machine.calls("compose")
    for refused in (machine.deploy("3"), machine.rollback(), machine.run("docker/deploy.sh", "scale")):
        assert refused.returncode == 1
        assert "ENV_FILE" in refused.stderr
        assert "0123456789abcdef" not in refused.stderr + refused.stdout
    assert machine.calls("compose") == before
    assert machine.images() == ["asr-api:2"] * 2
    settings = tmp_path / "settings.env"
    settings.write_text("".join(f"{name}={value}\n" for name, value in keys.items()))
    assert machine.deploy("3", ENV_FILE=str(settings)).returncode == 0
    assert f"--env-file {settings}" in machine.calls("compose")[-1]
    assert machine.deploy("4", **keys).returncode == 0
    assert machine.deploy("5", ASR_ALLOW_ANONYMOUS="true").returncode == 0, "it was said explicitly"
    assert machine.deploy("6").returncode == 0, "there was nothing to lose"


LIMIT = "ASR_QUEUE_LIMIT_AUDIO_S"


class Operator:
    """Someone who deploys with a file of settings, which the containers get from it as Compose would."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.file = machine.folder / "settings.env"

    def write(self, value: str) -> str:
        self.file.write_text(f"# comment\n{LIMIT}={value}\n")
        return str(self.file)

    def running(self) -> set[str]:
        """Value of the setting in each API container."""
        files = (self.machine.folder / "containers").glob("*-api")
        return {file.read_text().splitlines()[4] for file in files}


@pytest.fixture
def operator(machine: Machine) -> Operator:
    return Operator(machine)


def test_a_rollback_brings_the_settings_before_and_says_that_the_file_has_others(
    machine: Machine, operator: Operator
) -> None:
    assert machine.deploy("1", ENV_FILE=operator.write("100")).returncode == 0
    assert machine.deploy("2", ENV_FILE=operator.write("1")).returncode == 0
    assert operator.running() == {"1"}
    done = machine.rollback(ENV_FILE=str(operator.file))
    assert done.returncode == 0, done.stderr
    assert operator.running() == {"100"}
    assert f"note: {operator.file} is not what runs" in done.stderr
    assert f"{LIMIT}=1\n" in operator.file.read_text(), "the operator's own file is not written to"
    assert (machine.state / "settings").stat().st_mode & 0o077 == 0, "it holds keys"
    scaled = machine.run("docker/deploy.sh", "scale", ENV_FILE=str(operator.file), REPLICAS="3")
    assert scaled.returncode == 0, scaled.stderr
    assert operator.running() == {"100"}, "a new replica is like the others"
    assert len(machine.images()) == 3


def test_settings_that_do_not_start_are_taken_back_with_the_same_version(
    machine: Machine, operator: Operator
) -> None:
    assert machine.deploy("1", ENV_FILE=operator.write("100")).returncode == 0
    failed = machine.deploy("1", ENV_FILE=operator.write("bad"), FAKE_BROKEN_SETTING="bad")
    assert failed.returncode == 1
    assert "1 failed; going back to 1 with the settings that it had" in failed.stderr
    assert "  asr: what was wrong" in failed.stderr, "the container is gone, with its log"
    assert operator.running() == {"100"}
    assert "nothing to roll back" in machine.rollback(ENV_FILE=str(operator.file)).stdout
    assert machine.deploy("1", ENV_FILE=operator.write("200")).returncode == 0
    assert operator.running() == {"200"}
    assert machine.rollback(ENV_FILE=str(operator.file)).returncode == 0
    assert operator.running() == {"100"}
    assert machine.images() == ["asr-api:1"] * 2


def test_a_new_version_that_fails_for_its_settings_goes_back_to_both(
    machine: Machine, operator: Operator
) -> None:
    assert machine.deploy("1", ENV_FILE=operator.write("100")).returncode == 0
    failed = machine.deploy("2", ENV_FILE=operator.write("bad"), FAKE_BROKEN_SETTING="bad")
    assert failed.returncode == 1
    assert "failed too" not in failed.stderr
    assert machine.images() == ["asr-api:1"] * 2
    assert operator.running() == {"100"}


def test_make_up_can_be_taken_back_and_is_what_a_deployment_goes_back_to(
    machine: Machine, operator: Operator
) -> None:
    def up(version: str, value: str) -> None:
        settings = operator.write(value)
        for file in (machine.folder / "containers").glob("*-api"):
            file.unlink()  # Compose makes them again where a setting changed
        images = {"ASR_API_IMAGE": f"asr-api:{version}", "ASR_UI_IMAGE": f"asr-ui:{version}"}
        command = ("docker/compose.sh", "up", "--detach", "--scale", "api=2")
        assert machine.run(*command, ENV_FILE=settings, **images).returncode == 0
        assert machine.run("docker/deploy.sh", "keep", version, ENV_FILE=settings).returncode == 0

    up("1", "100")
    up("1", "100")
    assert not (machine.state / "previous").exists(), "nothing changed"
    up("1", "200")
    failed = machine.deploy("2", ENV_FILE=operator.write("bad"), FAKE_BROKEN_SETTING="bad")
    assert failed.returncode == 1
    assert operator.running() == {"200"}
    up("1", "3")
    assert machine.rollback(ENV_FILE=str(operator.file)).returncode == 0
    assert operator.running() == {"200"}
    assert machine.images() == ["asr-api:1"] * 2


@pytest.mark.parametrize("command", ["rollback", "recover"])
def test_a_deployment_that_was_broken_off_can_be_taken_back(
    machine: Machine, operator: Operator, command: str
) -> None:
    """The version before is the one that was being replaced, not the one before that."""
    assert machine.deploy("1", ENV_FILE=operator.write("100")).returncode == 0
    assert machine.deploy("2", ENV_FILE=operator.write("200")).returncode == 0
    settings = operator.write("300")
    calls = machine.folder / "calls"
    seen = len(calls.read_text().splitlines())

    def waits_for_a_replica(since: list[str]) -> bool:
        after_rm = list(itertools.dropwhile(lambda call: not call.startswith("rm "), since))
        return any("health=healthy" in call for call in after_rm)

    broken = {"FAKE_BROKEN": "sha256:asr-api:3", "HEALTHY_TIMEOUT_S": "60", "ENV_FILE": settings}
    with subprocess.Popen(
        ["docker/deploy.sh", "deploy", "3"], cwd=ROOT, env=machine.environment | broken,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as deploying:  # fmt: skip
        while not waits_for_a_replica(calls.read_text().splitlines()[seen:]):
            assert deploying.poll() is None
            time.sleep(0.05)
        os.killpg(deploying.pid, signal.SIGTERM)
        deploying.communicate()
    assert deploying.returncode != 0
    done = machine.run("docker/deploy.sh", command, ENV_FILE=settings)
    assert done.returncode == 0, done.stderr
    assert "a deployment broke off" in done.stdout
    assert machine.images() == ["asr-api:2"] * 2
    assert operator.running() == {"200"}
