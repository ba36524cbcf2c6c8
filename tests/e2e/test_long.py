"""An hour in one file: flat memory, no word lost, short clips served meanwhile; errors inside a stream."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile

from loadtest.processes import LiveServer
from tests.e2e.live import start
from tests.tiny_bundle import SAMPLE_RATE_HZ, recite, sing, wav

SENTENCES = ["head bad cafe", "abc", "fade"]


def hour() -> tuple[bytes, list[str]]:
    """One hour as flac, a sentence every few seconds, and the sentences."""
    piece = recite(SENTENCES, pause_s=3.0)
    count = int(np.ceil(3600 * SAMPLE_RATE_HZ / len(piece)))
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", SAMPLE_RATE_HZ, 1, format="FLAC") as sound:
        for _ in range(count):
            sound.write(piece)
    return file.getvalue(), SENTENCES * count


def peak_rss_bytes(server: LiveServer) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found.group(1)) * 1024


def test_an_hour_in_flat_memory_while_short_clips_are_served(models_dir: Path, tmp_path: Path) -> None:
    recording, sentences = hour()
    live = start(models_dir, tmp_path / "log", max_upload_bytes=200_000_000, max_body_bytes=200_000_000)
    result: list[httpx.Response] = []
    try:
        with live.client() as client:
            for _ in range(10):
                client.post("/transcribe", files={"file": wav(recite(SENTENCES * 5))})
            before_bytes = peak_rss_bytes(live)

            def send() -> None:
                result.append(httpx.post(f"{live.url}/transcribe", files={"file": recording}, timeout=280))

            sending = threading.Thread(target=send)
            sending.start()
            short = 0
            while sending.is_alive():
                answer = client.post("/transcribe", files={"file": wav(sing("abc"))})
                assert answer.json()["text"] == "abc"
                short += 1
                time.sleep(0.2)
            sending.join()
            grown_bytes = peak_rss_bytes(live) - before_bytes
    finally:
        live.kill()
    body = result[0].json()
    assert body["duration"] == pytest.approx(3600, abs=15)
    assert body["text"] == " ".join(sentences)
    assert short >= 3
    # An hour is 230 MB as float32; what may grow is the answer itself and a few windows.
    assert grown_bytes < 60_000_000


def test_error_after_the_first_text_is_a_frame_of_the_stream(client: httpx.Client) -> None:
    """This server's cap is ten minutes: the text of the first minutes has left by then."""
    recording = wav(recite(["abc"] * 400, pause_s=1.0))
    assert len(recording) / 2 / SAMPLE_RATE_HZ > 600
    with client.stream(
        "POST",
        "/v1/audio/transcriptions",
        data={"model": "tiny", "stream": "true"},
        files={"file": recording},
    ) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    error = json.loads(lines[-2])["error"]
    assert error["code"] == "audio_too_long"
    assert json.loads(lines[0])["delta"].startswith("abc")
    assert not any('"transcript.text.done"' in line for line in lines)
