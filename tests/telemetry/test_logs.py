"""Logs: form, ids, and what never reaches them."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import numpy as np
import pytest
import structlog

from api.telemetry import configure_logging
from api.telemetry.logs import Redactor

SPEECH = "attack at dawn"
KEY = "sk-live-0123456789abcdef"


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def last_line(stream: io.StringIO) -> dict[str, Any]:
    line = json.loads(stream.getvalue().splitlines()[-1])
    assert isinstance(line, dict)
    return line


def test_a_line_is_json_with_time_level_and_environment(stream: io.StringIO) -> None:
    configure_logging(log_format="json", environment="production", stream=stream)
    structlog.get_logger("x").info("ready", models=["m"], load_s=0.5)
    line = last_line(stream)
    assert (line["event"], line["level"], line["env"]) == ("ready", "info", "production")
    assert (line["models"], line["load_s"]) == (["m"], 0.5)
    assert line["timestamp"].endswith("Z")


def test_libraries_log_in_the_same_form(stream: io.StringIO) -> None:
    configure_logging(log_format="json", stream=stream)
    logging.getLogger("uvicorn.error").warning("port %d is taken", 8000)
    line = last_line(stream)
    assert (line["event"], line["level"], line["logger"]) == (
        "port 8000 is taken",
        "warning",
        "uvicorn.error",
    )


def test_the_console_form_is_for_people(stream: io.StringIO) -> None:
    configure_logging(log_format="console", stream=stream)
    structlog.get_logger("x").info("ready", port=8000)
    text = stream.getvalue()
    assert "ready" in text
    assert "port=8000" in text
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


def test_auto_is_json_where_nobody_watches(stream: io.StringIO) -> None:
    configure_logging(log_format="auto", stream=stream)
    structlog.get_logger("x").info("ready")
    assert last_line(stream)["event"] == "ready"


def test_levels_are_filtered(stream: io.StringIO) -> None:
    configure_logging(log_format="json", level="WARNING", stream=stream)
    structlog.get_logger("x").info("quiet")
    logging.getLogger("y").info("quiet")
    assert stream.getvalue() == ""


def test_speech_audio_and_keys_never_reach_a_log(stream: io.StringIO) -> None:
    configure_logging(log_format="json", level="DEBUG", secrets=[KEY], stream=stream)
    log = structlog.get_logger("x")
    log.info("done", text=SPEECH, segments=[{"text": SPEECH}], nested={"transcript": SPEECH})
    log.info("asked", hotwords=[SPEECH], prompt=SPEECH)
    log.info("got", waveform=np.ones(4, np.float32), body=b"RIFFxxxx", audio=[0.125, 0.25])
    log.info("auth", authorization=f"Bearer {KEY}", api_key=KEY, headers={"Cookie": "a=b", "X-Api-Key": KEY})
    log.info(f"refused key {KEY}", problem=f"no such key: {KEY}", url=f"/transcribe?api_key={KEY}&x=1")
    log.info("forwarded", header="Authorization: Bearer eyJhbGciOi.foo.bar")
    logging.getLogger("lib").warning("header was Bearer %s, password=hunter2", "abc.def.ghi")
    log.info("sent", access_token="tok-1", client_secret="tok-2", asr_api_keys="tok-3", x_auth_token="tok-4")
    log.info("refused", problem="got {'api_key': 'tok-5'}", endpoint="http://user:tok-6@collector:4317")
    text = stream.getvalue()
    hidden_everywhere = (SPEECH, KEY, "RIFF", "0.125", "a=b", "eyJhbGciOi", "abc.def.ghi", "hunter2", "tok-")
    for hidden in hidden_everywhere:
        assert hidden not in text, hidden
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[0]["text"] == "[removed]"
    assert lines[0]["nested"] == {"transcript": "[removed]"}
    assert lines[2]["waveform"] == "<array (4,) float32>"
    assert lines[2]["body"] == "<8 bytes>"
    assert lines[4]["url"] == "/transcribe?api_key=[removed]&x=1"
    assert lines[8]["endpoint"] == "http://[removed]@collector:4317"


def test_the_text_is_logged_when_the_setting_says_so_and_keys_are_not(stream: io.StringIO) -> None:
    configure_logging(log_format="json", log_text=True, secrets=[KEY], stream=stream)
    structlog.get_logger("x").info("done", text=SPEECH, api_key=KEY, audio=b"RIFF")
    line = last_line(stream)
    assert (line["text"], line["api_key"], line["audio"]) == (SPEECH, "[removed]", "<4 bytes>")


def test_a_traceback_shows_no_values_of_variables(stream: io.StringIO) -> None:
    configure_logging(log_format="json", stream=stream)

    def decode(spoken: str, key: str) -> None:
        raise ValueError("cannot decode")

    try:
        decode("attack " + "at dawn", "sk-live-" + "0123456789abcdef")
    except ValueError:
        structlog.get_logger("x").exception("failed")
    line = last_line(stream)
    assert "ValueError: cannot decode" in line["exception"]
    assert SPEECH not in stream.getvalue()
    assert KEY not in stream.getvalue()


@pytest.mark.timeout(60)
def test_looking_for_credentials_takes_no_longer_than_the_text_is() -> None:
    """Every second character of the tail begins a word that could be an address's scheme: hours, squared."""
    text = "https://user:hunter2@host " + "a." * 1_000_000
    assert Redactor(log_text=False).scrub(text).startswith("https://[removed]@host a.a.")
