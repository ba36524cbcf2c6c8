"""Ask a deployed service for a transcription, as a client would; exit status 0 only when all of it is right.

    python3 docker/smoke.py --url http://ADDRESS [--page http://ADDRESS] [--audio FILE] [--expect WORD]
                            [--timeout-s 120]

Waits for readiness, reads the models, sends the file to both transcription routes and checks the answers'
shape and consistency; asks for the page where one is named. The key, where one is needed, comes from
ASR_API_KEY. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = tuple(ROOT / name for name in ("samples/hello.flac", "samples/hello.wav"))


class SmokeError(Exception):
    """What the service got wrong, in one line."""


def request(url: str, body: bytes | None = None, content_type: str | None = None) -> tuple[int, bytes]:
    """Status and body of one request; HTTP errors are answers, not exceptions."""
    headers = {"Content-Type": content_type} if content_type else {}
    if key := os.environ.get("ASR_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        call = urllib.request.Request(url, data=body, headers=headers)
        with urllib.request.urlopen(call, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def wait_ready(url: str, timeout_s: float) -> None:
    """Return when this address answers 200; SmokeError when it does not within the time."""
    deadline_s = time.monotonic() + timeout_s
    last = "nothing answered"
    while time.monotonic() < deadline_s:
        try:
            status, _ = request(url)
            if status == 200:
                return
            last = f"status {status}"
        except OSError as error:
            last = str(error)
        time.sleep(1)
    raise SmokeError(f"{url}: not ready within {timeout_s:.0f} s: {last}")


def expect_json(url: str, body: bytes | None = None, content_type: str | None = None) -> dict[str, object]:
    """The JSON object of a 200 answer."""
    status, raw = request(url, body, content_type)
    if status != 200:
        raise SmokeError(f"{url}: {status} {raw[:300].decode(errors='replace')}")
    value = json.loads(raw)
    if not isinstance(value, dict):
        raise SmokeError(f"{url}: not a JSON object")
    return value


def form(fields: dict[str, str], file: Path) -> tuple[bytes, str]:
    """A multipart body, file last, and its content type."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{file.name}"\r\n\r\n'
    parts.append(head.encode() + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode())
    return b"".join(parts), f"multipart/form-data; boundary={boundary}"


def smoke(url: str, audio: Path, expected: str, timeout_s: float) -> str:
    """The transcript, after every check passed."""
    wait_ready(f"{url}/health/ready", timeout_s)
    models = expect_json(f"{url}/v1/models")["data"]
    if not isinstance(models, list) or not models:
        raise SmokeError("/v1/models lists no model")
    answer = expect_json(f"{url}/transcribe", *form({}, audio))
    for field in ("id", "text", "duration", "processing_time", "language", "model"):
        if field not in answer:
            raise SmokeError(f"/transcribe: the answer has no {field!r}")
    text = str(answer["text"])
    # The sample is English; of a recording that was named whoever named it knows that it speaks.
    if not text and (audio not in SAMPLES or answer["language"] == "en"):
        raise SmokeError(f"/transcribe: no text in {audio.name}")
    if expected.lower() not in text.lower():
        raise SmokeError(f"/transcribe: {expected!r} is not in {text!r}")
    if not float(str(answer["duration"])) > 0:
        raise SmokeError("/transcribe: no duration")
    compatible = expect_json(f"{url}/v1/audio/transcriptions", *form({"model": "whisper-1"}, audio))
    if compatible.get("text") != text:
        raise SmokeError(f"the two routes disagree: {text!r} and {compatible.get('text')!r}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--page", help="address of the web page")
    parser.add_argument("--audio", type=Path)
    parser.add_argument("--expect", default="", help="a word that the transcript must hold")
    parser.add_argument("--timeout-s", type=float, default=120.0)
    arguments = parser.parse_args()
    audio = arguments.audio or next((path for path in SAMPLES if path.is_file()), None)
    if audio is None:
        parser.error(f"none of {', '.join(map(str, SAMPLES))} is there; name a file with --audio")
    try:
        text = smoke(arguments.url.rstrip("/"), audio, arguments.expect, arguments.timeout_s)
        if arguments.page:
            wait_ready(f"{arguments.page.rstrip('/')}/_stcore/health", arguments.timeout_s)
    except (SmokeError, OSError) as error:
        sys.exit(f"FAILED  {arguments.url}: {error}")
    print(f"ok  {arguments.url}: {text!r}")


if __name__ == "__main__":
    main()
