"""`make run`: one clear line for what goes wrong, a transcription of the sample, and a clean stop."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from loadtest.processes import ROOT, environment, free_port
from tests.tiny_bundle import make_bundle

SCRIPT = ROOT / "scripts" / "run.py"

SIGNAL_INSIDE_POLL = """
import os, runpy, signal, subprocess, sys

class Popen(subprocess.Popen):
    def poll(self):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().poll()
        except BaseException as error:
            print("raised inside poll:", repr(error), flush=True)
            os._exit(3)

subprocess.Popen = Popen
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*arguments: str, script: Sequence[str] = (str(SCRIPT),), **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, *script, "--no-page", *arguments]
    given = environment({"ASR_CALIBRATE": "false", **variables})
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=given, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize(
    ("arguments", "variables", "status", "problem"),
    [
        (["--model", "absent"], {}, 1, "there is no model 'absent' in"),
        ([], {"PORT": "abc"}, 2, "argument --port: invalid int value: 'abc'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], variables: dict[str, str], status: int, problem: str
) -> None:
    process = start(*arguments, **variables)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert problem in error.splitlines()[-1]
    assert "Traceback" not in error


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = start("--model", "tiny", "--port", port, ASR_MODELS_DIR=str(tmp_path))
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith(f"error: port {port} for the API is not free")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_sample_is_transcribed_and_a_signal_stops_everything(
    tmp_path: Path, number: signal.Signals
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, and so it is by what is started")
    make_bundle(tmp_path)
    port = str(free_port())
    with start("--model", "tiny", "--port", port, ASR_MODELS_DIR=str(tmp_path)) as process:
        assert process.stdout is not None
        said = []
        try:
            for line in process.stdout:
                said.append(line)
                if "Ctrl-C stops everything" in line:
                    os.kill(process.pid, number)
            process.wait(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert any("samples/hello.flac" in line for line in said)
    assert said[-1] == "Stopped.\n"
    (logs,) = [line.split()[1] for line in said if line.split()[:1] == ["Logs"]]
    assert not Path(logs).exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)))


def test_a_signal_is_kept_while_a_child_is_asked_for_its_state(tmp_path: Path) -> None:
    """Popen holds a lock there: an exception at the wrong moment, and no child ends any more."""
    make_bundle(tmp_path)
    script = ("-c", SIGNAL_INSIDE_POLL, str(SCRIPT))
    arguments = ("--model", "tiny", "--port", str(free_port()))
    process = start(*arguments, script=script, ASR_MODELS_DIR=str(tmp_path))
    said, _ = process.communicate(timeout=60)
    assert said.endswith("Stopped.\n")
    assert process.returncode == 0


def test_keys_without_one_for_the_page_are_named(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    keys = {"ASR_MODELS_DIR": str(tmp_path), "ASR_API_KEYS": "me:sesame-sesame-sesame"}
    process = start("--model", "tiny", "--port", str(free_port()), ASR_API_KEY="not-this-one-at-all", **keys)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = error.splitlines()
    assert "set ASR_API_KEY" in line


def test_the_command_that_is_shown_names_the_key_where_one_is_needed(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    secret = "sesame-sesame-sesame"
    keys = {"ASR_MODELS_DIR": str(tmp_path), "ASR_API_KEYS": f"me:{secret}", "ASR_API_KEY": secret}
    process = start("--model", "tiny", "--port", str(free_port()), "--once", **keys)
    said, _ = process.communicate(timeout=120)
    (line,) = [line for line in said.splitlines() if "curl " in line]
    assert "curl -H 'Authorization: Bearer KEY' -F file=@FILE" in line
    assert secret not in said


def test_the_settings_of_the_env_file_hold_for_the_page_and_the_ports_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    names = ("ASR_API_KEY", "ASR_PORT", "OTEL_EXPORTER_OTLP_ENDPOINT", "STREAMLIT_SERVER_MAX_UPLOAD_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert not set(run.variables(tmp_path)) & set(names)
    (tmp_path / ".env").write_text(
        "ASR_API_KEY=sesame-sesame-sesame\nASR_PORT=8123\nSTREAMLIT_SERVER_MAX_UPLOAD_SIZE=100\nASR_HOST=\n"
        "OTEL_EXPORTER_OTLP_ENDPOINT=http://the-services-own:4317\n"
    )
    given = run.variables(tmp_path)
    assert [given.get(name) for name in names] == ["sesame-sesame-sesame", "8123", None, "100"]
    assert "ASR_HOST" not in given, "an empty value means the default"
    monkeypatch.setenv("ASR_API_KEY", "from-the-environment")
    monkeypatch.setenv("ASR_PORT", "")
    monkeypatch.setenv("ASR_MODELS", "")
    given = run.variables(tmp_path)
    assert "ASR_MODELS" not in given
    assert (given["ASR_API_KEY"], given["ASR_PORT"]) == ("from-the-environment", "8123")
    (tmp_path / ".env").write_bytes(b"ASR_PORT=\xff\n")
    with pytest.raises(run.RunError, match="not UTF-8"):
        run.variables(tmp_path)


def test_several_models_are_started_and_each_must_be_there(tmp_path: Path) -> None:
    make_bundle(tmp_path, "one")
    make_bundle(tmp_path, "two")
    given = {"ASR_MODELS_DIR": str(tmp_path), "ASR_PORT": str(free_port())}
    process = start("--once", ASR_MODELS="one,two", ASR_DEFAULT_MODEL="two", **given)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "audio, model two:" in said
    assert f":{given['ASR_PORT']}/docs" in said
    process = start("--once", ASR_MODELS="one, three", **given)
    _, error = process.communicate(timeout=60)
    assert error.startswith("error: there is no model 'three' in")


@pytest.mark.parametrize(("given", "shown"), [((), False), (("MODEL=other",), True)])
def test_make_names_a_model_only_where_one_is_given(given: tuple[str, ...], shown: bool) -> None:
    """Else ASR_MODELS, the environment's or that of `.env`, would never count."""
    told = {name: value for name, value in os.environ.items() if name not in ("MODEL", "MAKEFLAGS")}
    command = ["make", "--dry-run", "run", *given]
    planned = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in planned.splitlines() if "scripts/run.py" in line]
    assert ('--model "other"' in line) is shown
    assert ("--model" in line) is shown
