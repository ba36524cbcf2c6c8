"""What both proofs share: commands, images, stand-ins, test audio, and the report."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("ASR_SHARED_DIR") or ROOT.parent / "shared")
STAND_IN_BASE = "local/python:3.11-slim"
ALERT_TEMPLATES = Path("/usr/share/prometheus/alertmanager")
CACHE = Path(os.environ.get("ASR_E2E_CACHE", "/var/cache/asr-base"))


class Skip(Exception):
    """The proof cannot run here; the message says what is missing."""


class Report:
    """Prints each check as it passes; the first that fails ends the run. The last line is JSON."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started_s = time.monotonic()
        self.results: dict[str, object] = {}

    def step(self, text: str) -> None:
        print(f"\n== {text}", flush=True)

    def check(self, passed: bool, text: str, value: object = True) -> None:
        """Record one fact; AssertionError when it does not hold."""
        print(f"{'ok     ' if passed else 'FAILED '} {text}", flush=True)
        self.results[text.split(":")[0]] = value
        if not passed:
            raise AssertionError(text)

    def skipped(self, text: str) -> None:
        print(f"SKIPPED {text}", flush=True)

    def finish(self) -> None:
        print(
            json.dumps(
                {"proof": self.name, "seconds": round(time.monotonic() - self.started_s), **self.results}
            )
        )


def run(
    *command: str, env: Mapping[str, str] | None = None, timeout_s: float = 900, stdin: str | None = None
) -> str:
    """Standard output of a command. Raises RuntimeError with its last lines when it fails."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-25:])
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")
    return done.stdout


def succeeds(*command: str, timeout_s: float = 60) -> bool:
    """Whether a command ends with status 0 within the time."""
    try:
        return (
            subprocess.run(command, cwd=ROOT, capture_output=True, timeout=timeout_s, check=False).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float, every_s: float = 0.5) -> float:
    """Seconds until ``condition`` holds. Raises TimeoutError naming ``what``."""
    started_s = time.monotonic()
    while not condition():
        if time.monotonic() - started_s > timeout_s:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(every_s)
    return time.monotonic() - started_s


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_docker() -> None:
    """Raises Skip when there is no Docker engine to talk to."""
    if shutil.which("docker") is None:
        raise Skip("there is no docker command on this machine")
    if not succeeds("docker", "info"):
        raise Skip("no Docker engine answers (is dockerd running, and may this user reach it?)")


def available(image: str) -> bool:
    """Whether an image is here or can be pulled."""
    return succeeds("docker", "image", "inspect", image) or succeeds(
        "docker", "pull", "--quiet", image, timeout_s=180
    )


def base_image(report: Report) -> str:
    """The pinned base where a registry is within reach, else a stand-in made of Debian packages."""
    if chosen := os.environ.get("E2E_BASE_IMAGE"):
        return chosen
    pinned = next(
        line.split("=", 1)[1]
        for line in (ROOT / "docker" / "base.env").read_text().splitlines()
        if line.startswith("BASE_IMAGE=")
    )
    if available(pinned):
        return pinned
    report.skipped(
        f"the real base image: {pinned.split('@')[0]} cannot be pulled here; a stand-in takes its place"
    )
    if not succeeds("docker", "image", "inspect", STAND_IN_BASE):
        maker = SHARED / "tools" / "mkbase.sh"
        if not maker.is_file() or shutil.which("debootstrap") is None:
            raise Skip("no base image: no registry, and no debootstrap to make a stand-in with")
        run(str(maker), STAND_IN_BASE, str(CACHE))
    return STAND_IN_BASE


def model_name() -> str:
    """MODEL, else the bundle that ships, else any that is here. Raises Skip without one."""
    names = sorted(path.parent.name for path in ROOT.glob("models/*/manifest.json"))
    wanted = os.environ.get("MODEL") or "en-moonshine-tiny"
    if wanted in names:
        return wanted
    if not names:
        raise Skip("there is no model bundle under models/")
    return names[0]


def build(kind: str, version: str, base: str, model: str) -> str:
    """Build the project's own Dockerfile; returns the image's name.

    pip's settings of this machine (a mirror, a certificate) go in as a build secret, so none of them is in
    the image or in the repository.
    """
    environment = {"BASE_IMAGE": base, "VERSION": version, "MODEL": model}
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            key[4:].lower().replace("_", "-"): value
            for key, value in os.environ.items()
            if key.startswith("PIP_")
        }
        kept = {
            key: settings[key]
            for key in ("index-url", "cert", "default-timeout", "trusted-host")
            if key in settings
        }
        if kept:
            conf = Path(folder) / "pip.conf"
            conf.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in kept.items()))
            environment["PIP_CONF"] = str(conf)
        run("docker/build.sh", kind, f"asr-{kind}", env=environment, timeout_s=1800)
    return f"asr-{kind}:{version}"


def stand_in(name: str, base: str, binary: str, dockerfile: str) -> str | None:
    """An image around a program of this machine, for tests only; None when the program is not here."""
    path = shutil.which(binary, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if path is None:
        return None
    tag = f"local/{name}:stand-in"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, Path(folder) / binary)
        for template in ALERT_TEMPLATES.glob("*.tmpl"):  # Debian's alertmanager does not carry them inside
            shutil.copy(template, folder)
        (Path(folder) / "Dockerfile").write_text(
            f"FROM {base}\nUSER 0\nCOPY {binary} /usr/local/bin/{binary}\n{dockerfile}\n"
        )
        # The classic builder is enough here, and it is in every client.
        run("docker", "build", "--quiet", "--tag", tag, folder, env={"DOCKER_BUILDKIT": "0"})
    return tag


def audio_files(limit: int = 4) -> list[Path]:
    """Short recordings to transcribe: the sample that ships, and real speech where it is at hand."""
    found = [ROOT / "samples" / name for name in ("hello.flac", "hello.wav")]
    found += sorted((SHARED / "speech" / "test").rglob("*.flac"), key=lambda path: path.stat().st_size)[
        40:400:60
    ]
    files = [path for path in found if path.is_file()][:limit]
    if not files:
        raise Skip("no recording to transcribe: neither samples/ nor the shared test sets are here")
    return files


def main(name: str, proof: Callable[[Report], None]) -> None:
    """Run a proof; a skip ends with status 0 and its reason, a failed check with status 1."""
    report = Report(name)
    try:
        proof(report)
    except Skip as reason:
        print(f"SKIPPED {name}: {reason}")
        return
    except (AssertionError, RuntimeError, TimeoutError) as error:
        sys.exit(f"FAILED  {name}: {error}")
    report.finish()
