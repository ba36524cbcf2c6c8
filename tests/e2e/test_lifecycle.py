"""Start, readiness, drain and stop of real processes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from loadtest.processes import ROOT, SERVE, LiveServer
from tests.e2e.live import environment
from tests.e2e.raw_http import body, head, read_answer
from tests.tiny_bundle import make_bundle, recite, sing, wav

Launch = Callable[..., LiveServer]

AUDIO = wav(sing("head bad cafe"))
LONG = wav(recite(["head bad cafe"] * 60))


def test_alive_at_once_and_refusing_work_until_warm(models_dir: Path, tmp_path: Path, launch: Launch) -> None:
    """Several models make the start long enough to look at."""
    names = [f"m{index}" for index in range(4)]
    for name in names:
        make_bundle(tmp_path, name)
    live = launch(tmp_path, tmp_path / "log", wait=False, models=",".join(names), calibrate="true")
    try:
        with live.client() as client:
            seen_starting = False
            while True:
                assert client.get("/health/live").status_code == 200
                startup = client.get("/health/startup")
                if startup.status_code == 200:
                    break
                seen_starting = True
                assert startup.json() == {"status": "starting"}
                assert "retry-after" in startup.headers
                work = client.post("/transcribe", files={"file": AUDIO})
                if work.status_code != 200:  # it may have become ready in between
                    assert (work.status_code, work.json()["error"]["code"]) == (503, "not_ready")
                    assert int(work.headers["retry-after"]) >= 1
                time.sleep(0.02)
            assert seen_starting
            assert client.get("/health/ready").status_code == 200
            assert client.post("/transcribe", files={"file": AUDIO}).status_code == 200
    finally:
        live.kill()


def test_sigterm_under_load_loses_nothing(models_dir: Path, tmp_path: Path, launch: Launch) -> None:
    """Every request that got in is answered; after the grace period connections are refused, not dropped."""
    live = launch(models_dir, tmp_path / "log", drain_grace_s=6)
    answers: list[int] = []
    broken: list[str] = []
    stopped_at: list[float] = []
    lock = threading.Lock()

    def load(audio: bytes, text_parts: int) -> None:
        with httpx.Client(base_url=live.url, timeout=60) as client:
            while True:
                try:
                    response = client.post("/transcribe", files={"file": audio})
                except httpx.ConnectError:
                    return  # the listener is gone: nothing was accepted
                except httpx.TransportError as error:
                    with lock:
                        broken.append(repr(error))
                    return
                with lock:
                    answers.append(response.status_code)
                    if response.status_code == 200:
                        assert len(response.json()["text"].split()) == text_parts

    threads = [threading.Thread(target=load, args=(AUDIO, 3)) for _ in range(6)]
    threads += [threading.Thread(target=load, args=(LONG, 180)) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    live.process.send_signal(signal.SIGTERM)
    stopped_at.append(time.monotonic())
    time.sleep(0.3)
    with live.client() as client:
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        assert client.get("/health/live").status_code == 200
        served = client.post("/transcribe", files={"file": AUDIO})
        assert (served.status_code, served.headers["connection"]) == (200, "close")
    for thread in threads:
        thread.join(60)
    assert live.process.wait(30) == 0
    assert broken == []
    assert answers.count(200) > 20
    assert set(answers) <= {200, 503}
    assert '"event": "stopped"' in live.log
    assert "Traceback" not in live.log


@pytest.mark.skipif(sys.platform != "linux", reason="the filter of SYNs is Linux's")
def test_no_connection_that_was_let_in_is_reset_when_the_listener_closes(
    models_dir: Path, tmp_path: Path, launch: Launch
) -> None:
    """Sixteen callers open connections without a pause while the service stops."""
    live = launch(models_dir, tmp_path / "log", drain_grace_s=0)
    answered: list[str] = []
    broken: list[str] = []
    lock = threading.Lock()

    def knock() -> None:
        while True:
            try:
                connection = socket.create_connection(("127.0.0.1", live.port), timeout=20)
            except ConnectionRefusedError:
                return
            except OSError as error:
                with lock:
                    broken.append(repr(error))
                return
            with connection:
                try:
                    connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                    status = connection.recv(65536)[:12].decode()
                except OSError as error:
                    status = repr(error)
            with lock:
                (answered if status == "HTTP/1.1 200" else broken).append(status)

    threads = [threading.Thread(target=knock) for _ in range(16)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    live.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(30)
    assert live.process.wait(30) == 0
    assert broken == []
    assert len(answered) > 50


def test_refusal_while_draining_reaches_a_caller_that_is_still_sending(
    models_dir: Path, tmp_path: Path, launch: Launch
) -> None:
    """The answer closes the connection, but only after the body: a close before it would be a reset."""
    live = launch(models_dir, tmp_path / "log", drain_grace_s=3)
    live.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    size = 4_000_000
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as connection:
        connection.sendall(f"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n\r\n".encode())
        time.sleep(0.3)  # refused by now
        connection.sendall(bytes(size))
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"connection: close" in answer
    assert live.process.wait(30) == 0


def test_interrupt_stops_cleanly_without_grace(models_dir: Path, tmp_path: Path, launch: Launch) -> None:
    live = launch(models_dir, tmp_path / "log", drain_grace_s=30)
    live.process.send_signal(signal.SIGINT)
    assert live.process.wait(10) == 0


def upload_through(sent: signal.Signals, live: LiveServer, connection: socket.socket) -> None:
    """The signal comes while the body of a request is still arriving."""
    form = body(AUDIO)
    connection.sendall(head(len(form)) + form[:1000])
    time.sleep(0.3)
    live.process.send_signal(sent)
    time.sleep(0.5)
    connection.sendall(form[1000:])


@pytest.fixture
def hang_up_heard() -> Iterator[None]:
    """Under nohup the signal is ignored, here and in whatever is started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_hang_up_loses_nothing(
    models_dir: Path, tmp_path: Path, launch: Launch, hang_up_heard: None
) -> None:
    """A terminal that closes, or someone who thinks that it means to read the settings again."""
    live = launch(models_dir, tmp_path / "log")
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        upload_through(signal.SIGHUP, live, connection)
        status, _, answer = read_answer(connection, 20)
    assert (status, json.loads(answer)["text"]) == (200, "head bad cafe")
    assert live.process.wait(20) == 0


def test_a_stop_does_not_wait_for_models_that_nobody_will_ask(tmp_path: Path, launch: Launch) -> None:
    names = [f"m{index}" for index in range(8)]
    for name in names:
        make_bundle(tmp_path, name)
    live = launch(tmp_path, tmp_path / "log", wait=False, models=",".join(names), calibrate="true")
    with live.client() as client:
        assert client.get("/health/startup").status_code == 503
    live.process.send_signal(signal.SIGTERM)
    assert live.process.wait(60) == 0
    assert '"event": "start_broken_off"' in live.log
    assert '"event": "ready"' not in live.log
    assert '"event": "stopped"' in live.log


def test_drain_goes_on_while_an_upload_is_running(models_dir: Path, tmp_path: Path, launch: Launch) -> None:
    """A request whose body is still arriving when the signal comes is answered."""
    live = launch(models_dir, tmp_path / "log")
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        upload_through(signal.SIGTERM, live, connection)
        connection.settimeout(20)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer.lower()
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["text"] == "head bad cafe"
    assert live.process.wait(20) == 0


def test_who_is_not_done_when_the_drain_ends_is_told_to_come_back(
    models_dir: Path, tmp_path: Path, launch: Launch
) -> None:
    live = launch(models_dir, tmp_path / "log", drain_timeout_s=1)
    form = body(AUDIO)
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(head(len(form)) + form[:1000])
        time.sleep(0.3)
        live.process.send_signal(signal.SIGTERM)
        status, headers, answer = read_answer(connection, 20)
    assert (status, json.loads(answer)["error"]["code"]) == (503, "draining")
    assert int(headers["retry-after"]) > 0
    assert live.process.wait(20) == 0


def run_serve(models_dir: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        SERVE,
        env=environment(models_dir, **settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
    )


def test_port_in_use_is_one_clear_line(models_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_serve(models_dir, port=port)
    assert result.returncode == 2
    assert result.stderr == (
        f"asr: ASR_PORT={port}: is in use by another program; stop it, or choose another port\n"
    )


def test_missing_model_ends_the_start_with_its_own_status(models_dir: Path) -> None:
    result = run_serve(models_dir, models="nothing")
    assert result.returncode == 3
    assert "model_refused" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("asr: the service did not start: bundle 'nothing': ")
    assert last.endswith("bundles in the folder: other, tiny")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "status", "problem"),
    [
        ("ASR_PROVIDER", "openvino", 3, "the service did not start: ASR_PROVIDER=openvino: this build of"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "udp", 2, "OTEL_EXPORTER_OTLP_PROTOCOL=udp: grpc and http/protobuf"),
        ("ASR_SPOOL_DIR", "/nowhere", 2, "ASR_SPOOL_DIR=/nowhere: no file can be made there: No such"),
    ],
)
def test_what_only_shows_during_the_start_is_one_line_as_well(
    models_dir: Path, variable: str, value: str, status: int, problem: str
) -> None:
    given = environment(models_dir) | {variable: value, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    result = subprocess.run(SERVE, env=given, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert result.returncode == status
    assert result.stderr.splitlines()[-1].startswith(f"asr: {problem}")
    assert "Traceback" not in result.stderr


def test_changed_model_file_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, "tiny")
    with (bundle / "model.onnx").open("ab") as graph:
        graph.write(b"x")
    result = run_serve(tmp_path)
    assert result.returncode == 3
    assert "sha256" in result.stderr


@pytest.mark.parametrize(("variable", "value"), [("port", "eighty"), ("max_beam", "0"), ("graph", "int3")])
def test_bad_settings_are_one_line_and_status_two(models_dir: Path, variable: str, value: str) -> None:
    result = run_serve(models_dir, **{variable: value})
    assert result.returncode == 2
    assert result.stderr.startswith(f"asr: ASR_{variable.upper()}={value}: ")
    assert len(result.stderr.splitlines()) == 1


def test_model_files_may_change_under_a_running_service(tmp_path: Path, launch: Launch) -> None:
    """What was verified is in memory: replacing the files neither breaks nor changes what is served."""
    bundle = make_bundle(tmp_path, "tiny")
    live = launch(tmp_path, tmp_path / "log")
    try:
        (bundle / "model.onnx").write_bytes(b"broken")
        (bundle / "vocab.txt").unlink()
        with live.client() as client:
            assert client.post("/transcribe", files={"file": AUDIO}).json()["text"] == "head bad cafe"
            live.wait_ready()
    finally:
        live.kill()
