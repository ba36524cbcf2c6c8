"""Run the service once while the image is built, through its public interface, and stop it again.

It is the image's first test: a model that does not load, something that the pruning took away, or a request
that fails ends the build. What it leaves behind is the byte code of exactly the modules that serving imports.
"""

from __future__ import annotations

import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import wave

PORT = 18000
BASE = f"http://127.0.0.1:{PORT}"
READY_TIMEOUT_S = 300.0
BOUNDARY = "warm-up-boundary"
# Greedy and beam search with hotwords are separate roads; 48 kHz goes through the resampler.
REQUESTS: tuple[tuple[int, dict[str, str]], ...] = (
    (16_000, {"timestamps": "true"}),
    (48_000, {"beam": "8", "hotwords[]": "warm"}),
)


def tone(rate_hz: int, duration_s: float = 2.0) -> bytes:
    """A WAV file with a warbling tone (mono, 16 bit)."""
    samples = (
        int(9000 * math.sin(2 * math.pi * (300 + 120 * math.sin(6 * n / rate_hz)) * n / rate_hz))
        for n in range(int(rate_hz * duration_s))
    )
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))
    return buffer.getvalue()


def multipart(fields: dict[str, str], audio: bytes) -> bytes:
    """The body of a form with `fields` and one file, which comes last."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="tone.wav"\r\n\r\n'
    return b"".join([*parts, head.encode(), audio, f"\r\n--{BOUNDARY}--\r\n".encode()])


def wait_ready(service: subprocess.Popen[bytes]) -> float:
    """Seconds until /health/ready answers 200; SystemExit when the service ends or time runs out."""
    started = time.monotonic()
    while time.monotonic() - started < READY_TIMEOUT_S:
        if service.poll() is not None:
            raise SystemExit(f"the service ended with status {service.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"{BASE}/health/ready", timeout=2):
                return time.monotonic() - started
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise SystemExit(f"the service was not ready within {READY_TIMEOUT_S:.0f} s")


def transcribe(fields: dict[str, str], audio: bytes) -> dict[str, object]:
    """POST /transcribe; SystemExit with the service's answer when it refuses."""
    request = urllib.request.Request(
        f"{BASE}/transcribe",
        data=multipart(fields, audio),
        headers={"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            answer: dict[str, object] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{error.code}: {error.read().decode(errors='replace')}") from None


def main() -> None:
    environment = {**os.environ, "ASR_HOST": "127.0.0.1", "ASR_PORT": str(PORT), "ASR_LOG_LEVEL": "warning"}
    with subprocess.Popen([sys.executable, "-m", "api.cli", "serve"], env=environment) as service:
        try:
            print(f"ready after {wait_ready(service):.1f} s")
            for rate_hz, fields in REQUESTS:
                answer = transcribe(fields, tone(rate_hz))
                print(f"{rate_hz} Hz {fields}: {answer['processing_time']} s")
        finally:
            service.send_signal(signal.SIGTERM)
        if service.wait(timeout=60) not in (0, -signal.SIGTERM):
            raise SystemExit(f"the service ended with status {service.returncode}")


if __name__ == "__main__":
    main()
