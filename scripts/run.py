"""`make run`: start the API and the page, show one real transcription, stay until Ctrl-C.

Everything that can go wrong on a fresh machine (a port in use, a model that is not there, a full disk,
a child that dies) ends in one clear line and a non-zero exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import httpx
from dotenv import dotenv_values

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "samples" / "hello.flac"
READY_TIMEOUT_S = 300.0  # a machine that is busy with something else; seconds where it is not
SLOW_AFTER_S = 20.0
STOP_TIMEOUT_S = 30.0
NEEDED_FREE_BYTES = 200 << 20  # logs, spooled uploads and, without a compiler, numba's cache


class RunError(Exception):
    """One clear line for the person at the terminal."""


class Interruption:
    """SIGINT, SIGTERM and SIGHUP (a closed terminal) as KeyboardInterrupt, but only around waiting.

    That is inside its ``with`` blocks. A signal that comes at any other moment is kept until the next block
    begins. Raised inside Popen's own code it could leave a lock behind there, and the child would be waited
    for without end.
    """

    def __init__(self) -> None:
        self._asked = self._waiting = False

    def install(self) -> None:
        """Handle them from now on, but for those that are to be ignored, as nohup and ``&`` have it."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._waiting:
            self._waiting = False  # what follows is the cleanup, which nothing interrupts
            raise KeyboardInterrupt

    def __enter__(self) -> None:
        self._waiting = True  # first: a signal between the two lines is raised, not forgotten
        if self._asked:
            self._waiting = False
            raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        self._waiting = False


interruption = Interruption()


def check_port(host: str, port: int, name: str, variable: str) -> None:
    """Raise RunError when `port` cannot be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RunError(
                f"port {port} for {name} is not free ({error.strerror}); "
                f"stop what uses it or choose another: make run {variable}={port + 1}"
            ) from error


def check_models(models_dir: Path, names: str) -> None:
    """Raise RunError when no bundle of a name in the comma list is there."""
    there = sorted(path.parent.name for path in models_dir.glob("*/manifest.json"))
    absent = [name for name in (part.strip() for part in names.split(",")) if name and name not in there]
    if not absent:
        return
    raise RunError(
        f"there is no model {absent[0]!r} in {models_dir}; there: {', '.join(there) or 'none'} "
        "(more: .venv/bin/asr models list)"
    )


class Child:
    """One started process whose output goes to a log file."""

    def __init__(
        self, name: str, command: Sequence[str], environment: dict[str, str], log_path: Path
    ) -> None:
        self.name = name
        self.log_path = log_path
        with log_path.open("wb") as log:
            # A session of its own: Ctrl-C reaches this script, which then stops the children in order.
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise RunError with the log's end when the process has ended."""
        status = self.process.poll()
        if status is None:
            return
        tail = self.log_path.read_text(errors="replace").strip().splitlines()[-15:]
        raise RunError(
            f"the {self.name} stopped with status {status}:\n  " + "\n  ".join(tail or ["(it said nothing)"])
        )

    def stop(self) -> None:
        """SIGTERM, then wait for the drain; SIGKILL only when that takes too long."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def wait_ready(url: str, children: Sequence[Child]) -> float:
    """Poll `url` until it answers 200; seconds waited. RunError when a child ends or the time is up."""
    started = time.monotonic()
    said_at = started
    while time.monotonic() - started < READY_TIMEOUT_S:
        for child in children:
            child.check()
        if time.monotonic() - said_at > SLOW_AFTER_S:
            said_at = time.monotonic()
            print(
                f"  still starting after {said_at - started:.0f} s; the log is {children[0].log_path}",
                flush=True,
            )
        with interruption, contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2.0).status_code == 200:
                return time.monotonic() - started
        with interruption:
            time.sleep(0.1)
    raise RunError(f"{url} was not ready after {READY_TIMEOUT_S:.0f} s; the log is {children[0].log_path}")


def variables(folder: Path = ROOT) -> dict[str, str]:
    """The environment, and under it what `.env` sets: the service reads that file itself, the page does not.

    Without it the service's keys would shut out the page that starts beside it, and a port that stands there
    would be asked for at another number. Raises RunError where the file is not text.
    """
    try:
        written = dotenv_values(folder / ".env")
    except UnicodeDecodeError as error:
        raise RunError(f"{folder / '.env'} is not UTF-8 text ({error.reason})") from error
    ours = {name for name in {*written, *os.environ} if name.startswith(("ASR_", "STREAMLIT_"))}
    # an empty value means the default, in either place
    set_here = {name: value for name in ours if (value := os.environ.get(name) or written.get(name))}
    return {name: value for name, value in os.environ.items() if name not in ours} | set_here


def transcribe_sample(base_url: str, api_key: str | None) -> None:
    """Send the committed sample through the API, to its default model, and print what came back."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with interruption, SAMPLE.open("rb") as file:
        response = httpx.post(
            f"{base_url}/transcribe",
            files={"file": file},
            headers=headers,
            timeout=120.0,
        )
    if response.status_code == 401:
        raise RunError(
            "the API has keys (ASR_API_KEYS), and the sample and the page have none that fits; "
            "set ASR_API_KEY to the secret of one of them, in .env or in the environment"
        )
    if response.status_code != 200:
        raise RunError(f"the API answered {response.status_code} to the sample: {response.text[:300]}")
    answer = response.json()
    print(f"\n  {SAMPLE.relative_to(ROOT)}, {answer['duration']:.1f} s of audio, model {answer['model']}:")
    print(f"\n      “{answer['text']}”\n")
    print(
        f"  transcribed in {answer['processing_time'] * 1000:.0f} ms "
        f"({1 / max(answer['real_time_factor'], 1e-9):.0f} times faster than it was spoken)"
    )


def run(arguments: argparse.Namespace, given: dict[str, str]) -> None:
    """Start with the variables that are given, show, wait, stop."""
    models_dir = ROOT / given.get("ASR_MODELS_DIR", "models")
    check_models(models_dir, arguments.model)
    check_port(arguments.host, arguments.port, "the API", "PORT")
    page = ROOT / "ui" / "app.py"
    if not arguments.no_page:
        check_port(arguments.host, arguments.page_port, "the page", "PAGE_PORT")
    if shutil.disk_usage(tempfile.gettempdir()).free < NEEDED_FREE_BYTES:
        raise RunError(f"{tempfile.gettempdir()} has less than {NEEDED_FREE_BYTES >> 20} MiB free")

    every_interface = {"0.0.0.0", "::"}  # noqa: S104 - compared with, not bound to
    shown_host = "localhost" if arguments.host in {"127.0.0.1"} | every_interface else arguments.host
    base_url = f"http://127.0.0.1:{arguments.port}"
    environment = given | {
        "ASR_HOST": arguments.host,
        "ASR_PORT": str(arguments.port),
        "ASR_MODELS_DIR": str(models_dir),
        "ASR_MODELS": arguments.model,
        "ASR_API_URL": base_url,
        "PYTHONUNBUFFERED": "1",
    }
    key = given.get("ASR_API_KEY")
    logs = Path(tempfile.mkdtemp(prefix="asr-run-"))
    children: list[Child] = []
    try:
        print(f"Starting the API with {arguments.model} …", flush=True)
        api = Child("API", [sys.executable, "-m", "api.cli", "serve"], environment, logs / "api.log")
        children.append(api)
        if not arguments.no_page:
            command = [sys.executable, "-m", "streamlit", "run", str(page), "--server.headless=true"]
            command += [f"--server.address={arguments.host}", f"--server.port={arguments.page_port}"]
            children.append(Child("page", command, environment, logs / "page.log"))
        waited_s = wait_ready(f"{base_url}/health/ready", children)
        print(f"Ready after {waited_s:.1f} s.")
        transcribe_sample(base_url, key)
        if not arguments.no_page:
            wait_ready(f"http://127.0.0.1:{arguments.page_port}/_stcore/health", children)
            print(f"\n  Page        http://{shown_host}:{arguments.page_port}   drop a file, or speak")
        print(f"  API         http://{shown_host}:{arguments.port}")
        print(f"  Reference   http://{shown_host}:{arguments.port}/docs")
        credentials = "-H 'Authorization: Bearer KEY' " if key else ""
        print(
            f"  Your file   curl {credentials}-F file=@FILE http://{shown_host}:{arguments.port}/transcribe"
        )
        print(f"  Logs        {logs}\n\nCtrl-C stops everything.", flush=True)
        while not arguments.once:
            for child in children:
                child.check()
            with interruption:
                time.sleep(0.5)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # of a terminal that is gone
            print("\nStopping: requests that were accepted are finished first …", flush=True)
    finally:
        for child in reversed(children):
            child.stop()
    shutil.rmtree(logs, ignore_errors=True)  # kept where something failed
    with contextlib.suppress(OSError):
        print("Stopped.", flush=True)


def main() -> int:
    """Parse the command line; exit status 0 after a clean stop, 1 after a clear line on stderr."""
    try:
        given = variables()
        parser = argparse.ArgumentParser(description=__doc__)
        models = given.get("ASR_MODELS", "en-moonshine-tiny")
        parser.add_argument("--model", default=models, help="or several, as a comma list")
        parser.add_argument("--host", default=given.get("ASR_HOST", "127.0.0.1"))
        # as text, which argparse reads as it reads an option: one that is no number ends in one line as well
        port = given.get("PORT", given.get("ASR_PORT", "8000"))
        parser.add_argument("--port", type=int, default=port)
        parser.add_argument("--page-port", type=int, default=given.get("PAGE_PORT", "8501"))
        parser.add_argument("--no-page", action="store_true", help="the API alone")
        parser.add_argument("--once", action="store_true", help="stop after the sample; for tests")
        arguments = parser.parse_args()
        interruption.install()
        run(arguments, given)
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
