"""Live sessions on a real service: OpenAI's with the official client, Vosk's with a plain WebSocket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soxr
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from api.live.connection import PING_TIMEOUT
from loadtest.processes import LiveServer
from tests.e2e.live import start
from tests.tiny_bundle import SAMPLE_RATE_HZ, sing

Launch = Callable[..., LiveServer]

WORDS = ("head bad", "cafe", "dead bee")
SECRET = "alice-secret-0123456789"
TRANSCRIPTION = "conversation.item.input_audio_transcription"


def pcm(*parts: NDArray[np.float32] | float) -> bytes:
    """Sound, and seconds of silence, as 16-bit samples at the model's rate."""
    sound = [
        np.zeros(round(part * SAMPLE_RATE_HZ), np.float32) if isinstance(part, int | float) else part
        for part in parts
    ]
    return (np.concatenate(sound) * 32767).astype("<i2").tobytes()


SPEECH = pcm(1.0, sing(WORDS[0]), 1.0, sing(WORDS[1]), 1.0, sing(WORDS[2]), 1.0)


def socket_url(server: LiveServer, path: str) -> str:
    return f"ws://{server.address}{path}"


@dataclass(frozen=True)
class Session:
    """One realtime session by hand, where the official client is too polite."""

    socket: ClientConnection

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def append(self, data: bytes) -> None:
        self.send("input_audio_buffer.append", audio=base64.b64encode(data).decode())

    def listen(self, **audio_input: Any) -> None:
        """Take 16 kHz from here on, and what `audio_input` says."""
        chosen = {"format": {"type": "audio/pcm", "rate": SAMPLE_RATE_HZ}, **audio_input}
        self.send("session.update", session={"audio": {"input": chosen}})
        assert self.receive()["type"] == "session.updated"

    def receive(self) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.socket.recv(timeout=60))
        return event

    def until(self, kind: str) -> dict[str, Any]:
        """The next event of this kind; those before it are dropped."""
        while (event := self.receive())["type"] != kind:
            pass
        return event

    def transcript(self) -> str:
        text: str = self.until(f"{TRANSCRIPTION}.completed")["transcript"]
        return text


@contextlib.contextmanager
def realtime(server: LiveServer, path: str = "/v1/realtime", **options: Any) -> Iterator[Session]:
    with connect(socket_url(server, path), proxy=None, **options) as socket:
        session = Session(socket)
        assert session.receive()["type"] == "session.created"
        yield session


def sessions(client: httpx.Client) -> int:
    return int(client.get("/health").json()["live_sessions"])


def metric(client: httpx.Client, series: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.removeprefix(series)) for line in lines if line.startswith(series))


def wait_for_sessions(client: httpx.Client, count: int) -> None:
    until_s = time.monotonic() + 30
    while sessions(client) != count:
        assert time.monotonic() < until_s
        time.sleep(0.02)


# -- OpenAI


def test_the_official_client_transcribes_three_utterances(server: LiveServer) -> None:
    events = asyncio.run(official_session(server))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["session.created", "session.updated"]
    completed = [event for event in events if event["type"] == f"{TRANSCRIPTION}.completed"]
    assert [event["transcript"] for event in completed] == list(WORDS)
    committed = [event for event in events if event["type"] == "input_audio_buffer.committed"]
    ids = [event["item_id"] for event in committed]
    assert [event.get("previous_item_id") for event in committed] == [None, *ids[:2]]
    assert [event["item_id"] for event in completed] == ids
    for index, (item_id, event) in enumerate(zip(ids, completed, strict=True)):
        of_item = [each for each in events if each.get("item_id") == item_id]
        assert "".join(e["delta"] for e in of_item if e["type"] == f"{TRANSCRIPTION}.delta") == WORDS[index]
        start_ms = next(e["audio_start_ms"] for e in of_item if e["type"].endswith("speech_started"))
        end_ms = next(e["audio_end_ms"] for e in of_item if e["type"].endswith("speech_stopped"))
        assert event["usage"]["type"] == "duration"
        assert event["usage"]["seconds"] == pytest.approx((end_ms - start_ms) / 1000, abs=0.002)
    first_start_ms = next(e["audio_start_ms"] for e in events if e["type"].endswith("speech_started"))
    assert first_start_ms == pytest.approx(800, abs=40)


async def official_session(server: LiveServer) -> list[dict[str, Any]]:
    client = openai.AsyncOpenAI(api_key="none", base_url=f"{server.url}/v1")
    events: list[dict[str, Any]] = []
    async with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        await connection.session.update(
            session={"type": "transcription", "audio": {"input": {"transcription": {"model": "whisper-1"}}}}
        )
        at_16_khz = np.frombuffer(SPEECH, "<i2").astype(np.float32) / 32768
        at_24_khz = pcm(soxr.resample(at_16_khz, SAMPLE_RATE_HZ, 24_000))  # what its types allow
        for at in range(0, len(at_24_khz), 3_001):
            piece = base64.b64encode(at_24_khz[at : at + 3_001]).decode()
            await connection.input_audio_buffer.append(audio=piece)
        async for event in connection:
            events.append(event.to_dict())
            if sum(each["type"] == f"{TRANSCRIPTION}.completed" for each in events) == len(WORDS):
                return events
    raise AssertionError("the session ended early")


def test_without_turn_detection_the_caller_commits(server: LiveServer) -> None:
    with realtime(server) as session:
        session.listen(turn_detection=None)
        session.append(pcm(sing("bad "), 1.0, sing("cafe")))
        session.send("input_audio_buffer.commit", event_id="mine")
        assert session.receive()["type"] == "input_audio_buffer.committed"
        assert session.transcript() == "bad cafe"
        session.send("input_audio_buffer.commit", event_id="mine")
        error = session.until("error")["error"]
        assert (error["code"], error["event_id"]) == ("input_audio_buffer_commit_empty", "mine")


def test_an_utterance_longer_than_the_model_takes_at_once(server: LiveServer) -> None:
    """The tone model takes four seconds; the text is whole all the same, and its tokens join to it."""
    words = ["head", "bad", "cafe", "dead"] * 5
    with realtime(server) as session:
        session.send("session.update", session={"include": ["item.input_audio_transcription.logprobs"]})
        session.until("session.updated")
        session.listen(turn_detection=None)
        session.append(pcm(*(part for word in words for part in (sing(word + " "), 0.2))))
        session.send("input_audio_buffer.commit")
        done = session.until(f"{TRANSCRIPTION}.completed")
        assert done["transcript"].split() == words
        assert "".join(token["token"] for token in done["logprobs"]) == done["transcript"]


def test_logprobs_and_another_model_when_asked_for(server: LiveServer) -> None:
    with realtime(server, "/v1/realtime?model=tiny") as session:
        session.send("session.update", session={"include": ["item.input_audio_transcription.logprobs"]})
        assert session.receive()["session"]["audio"]["input"]["transcription"]["model"] == "tiny"
        session.listen(transcription={"model": "other", "language": "vi", "keywords": ["cafe"]})
        session.append(pcm(1.0, sing("cafe"), 1.0))
        done = session.until(f"{TRANSCRIPTION}.completed")
        assert "".join(token["token"] for token in done["logprobs"]) == done["transcript"] == "cafe"
        assert all(token["logprob"] <= 0 for token in done["logprobs"])


def test_g711_as_telephones_send_it(server: LiveServer) -> None:
    """Silence, and that nothing else is heard in it, in both forms."""
    for law, silence in (("audio/pcmu", b"\xff"), ("audio/pcma", b"\xd5")):
        with realtime(server) as session:
            session.listen(format={"type": law}, turn_detection=None)
            session.append(silence * 8000)
            session.send("input_audio_buffer.commit")
            assert session.until(f"{TRANSCRIPTION}.completed")["usage"]["seconds"] == pytest.approx(
                1, abs=0.01
            )


def test_clear_forgets_what_was_not_committed(server: LiveServer) -> None:
    with realtime(server) as session:
        session.listen(turn_detection=None)
        session.append(pcm(sing("bad")))
        session.send("input_audio_buffer.clear")
        assert session.receive()["type"] == "input_audio_buffer.cleared"
        session.append(pcm(sing("cafe")))
        session.send("input_audio_buffer.commit")
        assert session.transcript() == "cafe"


def test_half_a_sample_before_an_event_shifts_nothing_that_comes_after(server: LiveServer) -> None:
    data = pcm(sing("bad "), 1.0, sing("cafe"))
    with realtime(server) as session:
        session.listen(turn_detection=None)
        session.append(bytes(4001))
        session.send("input_audio_buffer.commit")
        session.append(bytes(4000))
        session.send("session.update", session={"audio": {"input": {"transcription": {"model": "other"}}}})
        session.append(b"\0" + data)
        session.send("input_audio_buffer.commit")
        assert [session.transcript() for _ in range(3)] == ["", "", "bad cafe"]


def test_a_change_of_the_session_loses_nothing_that_was_heard(server: LiveServer) -> None:
    with realtime(server) as session:
        session.listen(turn_detection=None)
        session.append(pcm(sing("bad")))
        session.send("session.update", session={"audio": {"input": {"transcription": {"model": "other"}}}})
        session.append(pcm(sing("cafe")))
        session.send("input_audio_buffer.commit")
        assert [session.transcript(), session.transcript()] == ["bad", "cafe"]


def test_changes_of_the_session_shift_no_time_that_comes_after(server: LiveServer) -> None:
    with realtime(server) as session:
        for number in range(30):
            detection = {"type": "server_vad", "silence_duration_ms": 500 + number}
            session.listen(format={"type": "audio/pcm", "rate": 24_000}, turn_detection=detection)
            session.append(bytes(4800))
        session.append(pcm(soxr.resample(sing("cafe"), SAMPLE_RATE_HZ, 24_000)))
        start_ms = session.until("input_audio_buffer.speech_started")["audio_start_ms"]
    assert start_ms == pytest.approx(3000 - 100, abs=60)  # what came before the last update is no padding


def test_an_update_that_changes_nothing_of_how_it_is_heard_commits_nothing(server: LiveServer) -> None:
    data = pcm(sing("dead bee"))
    half = len(data) // 4 * 2 + 1
    with realtime(server) as session:
        session.listen(turn_detection=None)
        session.append(data[:half])
        for changes in (
            {"audio": {"input": {"transcription": {"model": "tiny", "language": "en", "keywords": ["bee"]}}}},
            {"include": ["item.input_audio_transcription.logprobs"]},
            {"audio": {"input": {"turn_detection": None, "format": {"rate": SAMPLE_RATE_HZ}}}},
        ):
            session.send("session.update", session=changes)
            session.until("session.updated")
        session.append(data[half:])
        session.send("input_audio_buffer.commit")
        assert session.until("input_audio_buffer.committed")["previous_item_id"] is None
        assert session.transcript() == "dead bee"


@pytest.mark.parametrize(
    "changes",
    [
        {"turn_detection": {"type": "server_vad"}},
        {"format": {"type": "audio/pcm", "rate": 24_000}},
        {"transcription": {"model": "other"}},
    ],
)
def test_an_update_that_changes_how_it_is_heard_commits(server: LiveServer, changes: dict[str, Any]) -> None:
    with realtime(server) as session:
        session.listen(turn_detection=None)
        session.append(pcm(sing("bad")))
        session.send("session.update", session={"audio": {"input": changes}})
        session.until("input_audio_buffer.committed")
        session.until("session.updated")
        assert session.transcript() == "bad"


def test_the_open_utterance_keeps_its_keywords_and_the_next_has_the_new_ones(server: LiveServer) -> None:
    """Between two tones, at equal strength, the hotword decides; what is refused changes nothing."""
    mixed = pcm(sing("ca"), (sing("b") + sing("d")) / 2, sing("e"))
    with realtime(server) as session:
        session.listen(turn_detection=None, transcription={"keywords": ["cabe"]})
        session.append(mixed[:4000])
        session.listen(transcription={"keywords": ["cade"]})
        session.send("session.update", session={"audio": {"input": {"transcription": {"language": "vi"}}}})
        assert session.receive()["error"]["code"] == "unsupported_language"
        session.append(mixed[4000:])
        session.send("input_audio_buffer.commit")
        assert session.transcript() == "cabe"
        session.append(mixed)
        session.send("input_audio_buffer.commit")
        assert session.transcript() == "cade"


def transcribing_with(**fields: str) -> str:
    return json.dumps({"type": "session.update", "session": {"audio": {"input": {"transcription": fields}}}})


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ("{", "invalid_request", None),
        ("[]", "invalid_request", None),
        (b"\x00\x01", "invalid_request", None),
        ('{"type": "x", "event_id": "\\ud800"}', "invalid_request", "type"),
        ('{"type": "response.create"}', "invalid_request", "type"),
        ('{"type": ["x"]}', "invalid_request", "type"),
        ('{"type": "input_audio_buffer.append"}', "invalid_request", "audio"),
        ('{"type": "input_audio_buffer.append", "audio": "%%"}', "invalid_request", "audio"),
        ('{"type": "session.update"}', "invalid_request", "session"),
        (transcribing_with(model="no"), "model_not_found", "model"),
        (transcribing_with(language="de"), "unsupported_language", "language"),
    ],
)
def test_a_wrong_event_is_answered_and_the_session_goes_on(
    server: LiveServer, message: str | bytes, code: str, param: str | None
) -> None:
    with realtime(server) as session:
        session.listen()
        session.socket.send(message)
        error = session.until("error")["error"]
        assert (error["code"], error["param"]) == (code, param)
        session.append(pcm(1.0, sing("cafe"), 1.0))
        assert session.transcript() == "cafe"


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [("model=no", 404, "model_not_found"), ("intent=conversation", 422, "invalid_value")],
)
def test_what_cannot_be_is_refused_before_the_socket_opens(
    server: LiveServer, query: str, status: int, code: str
) -> None:
    with pytest.raises(InvalidStatus) as caught:
        connect(socket_url(server, f"/v1/realtime?{query}"), proxy=None)
    response = caught.value.response
    assert response.status_code == status
    assert json.loads(response.body or b"")["error"]["code"] == code


@pytest.mark.parametrize("path", ["/nope", "/", "/transcribe", "/v1/realtime/", "/vosk/x?y=1"])
def test_an_unknown_address_is_not_found_in_the_form_of_all_errors(server: LiveServer, path: str) -> None:
    series = 'asr_requests_total{model="unknown",outcome="invalid",route="unmatched"}'
    with server.client() as http:
        before = metric(http, series)
        with pytest.raises(InvalidStatus) as caught:
            connect(socket_url(server, path), proxy=None)
        response = caught.value.response
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/json"
        error = json.loads(response.body or b"")["error"]
        assert (error["code"], error["type"]) == ("not_found", "invalid_request_error")
        assert metric(http, series) == before + 1


# -- Vosk


def vosk(server: LiveServer, data: bytes, config: dict[str, Any] | None, step: int = 4000) -> list[Any]:
    """What one session answers, message by message."""
    answers = []
    with connect(socket_url(server, "/vosk"), proxy=None) as socket:
        if config is not None:
            socket.send(json.dumps({"config": config}))
        for at in range(0, len(data), step):
            socket.send(data[at : at + step])
            answers.append(json.loads(socket.recv(timeout=60)))
        socket.send('{"eof" : 1}')
        answers.append(json.loads(socket.recv(timeout=60)))
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=60)
    return answers


def test_vosk_answers_each_message_with_a_partial_or_a_text(server: LiveServer) -> None:
    answers = vosk(server, SPEECH, {"sample_rate": SAMPLE_RATE_HZ, "phrase_list": ["cafe", "[unk]"]})
    assert len(answers) == -(-len(SPEECH) // 4000) + 1
    texts = [answer for answer in answers if answer.get("text")]
    assert [answer["text"] for answer in texts] == list(WORDS)
    assert all(set(answer) in ({"partial"}, {"text"}, {"text", "result"}) for answer in answers)
    words = [word for answer in texts for word in answer["result"]]
    assert [word["word"] for word in words] == " ".join(WORDS).split()
    assert all(0 < word["conf"] <= 1 for word in words)
    # Times count from the start of the recording, where the first word begins after 1.1 seconds.
    assert words[0]["start"] == pytest.approx(1.1, abs=0.1)
    starts = [word["start"] for word in words]
    assert starts == sorted(starts)
    assert starts[-1] > 3.0
    partials = [answer["partial"] for answer in answers if answer.get("partial")]
    assert all(any(text.startswith(partial[:1]) for text in WORDS) for partial in partials)


def test_vosk_looks_seldom_where_the_caller_does_not_wait_for_it(server: LiveServer) -> None:
    """Looks at every chance would decode each second of these utterances about six times."""
    data = pcm(*(part for word in ("head", "bad", "cafe", "dead") * 8 for part in (sing(word + " "), 0.2)))
    series = 'asr_audio_computed_seconds_total{model="tiny"}'
    with server.client() as http:
        before_s = metric(http, series)
        vosk(server, data, {"sample_rate": SAMPLE_RATE_HZ}, step=3200)
        computed_s = metric(http, series) - before_s
    assert computed_s < 3 * len(data) / 2 / SAMPLE_RATE_HZ


def test_vosk_tells_at_the_end_what_no_pause_ended(server: LiveServer) -> None:
    config = {"sample_rate": SAMPLE_RATE_HZ, "words": False}
    answers = vosk(server, pcm(0.5, sing("bad cafe")), config)
    assert answers[-1] == {"text": "bad cafe"}
    assert vosk(server, b"", config) == [{"text": ""}]


def test_vosk_reset_tells_the_rest_and_goes_on(server: LiveServer) -> None:
    with connect(socket_url(server, "/vosk"), proxy=None) as socket:
        socket.send(json.dumps({"config": {"sample_rate": SAMPLE_RATE_HZ, "words": 0}}))
        for word in ("bad", "cafe"):
            socket.send(pcm(0.5, sing(word)))
            assert "partial" in json.loads(socket.recv(timeout=60))
            socket.send('{"reset": 1}')
            assert json.loads(socket.recv(timeout=60)) == {"text": word}


def test_vosk_configs_add_up_until_the_audio_and_then_only_words_counts(server: LiveServer) -> None:
    mixed = pcm(0.5, sing("ca"), (sing("b") + sing("d")) / 2, sing("e"))  # the phrase decides
    with connect(socket_url(server, "/vosk"), proxy=None) as socket:
        for config in (
            {"sample_rate": str(SAMPLE_RATE_HZ), "phrase_list": ["cade"], "max_alternatives": 3},
            {"phrase_list": ["cabe"]},
            {"words": False},
        ):
            socket.send(json.dumps({"config": config}))
        socket.send(mixed)
        assert "partial" in json.loads(socket.recv(timeout=60))
        socket.send('{"reset": 1}')
        assert json.loads(socket.recv(timeout=60)) == {"text": "cabe"}
        socket.send(
            json.dumps({"config": {"words": 1, "phrase_list": 0, "sample_rate": 8000, "model": "no"}})
        )
        socket.send(mixed)
        assert "partial" in json.loads(socket.recv(timeout=60))
        socket.send('{"eof": 1}')
        answer = json.loads(socket.recv(timeout=60))
        assert answer["text"] == "cabe"
        assert [word["word"] for word in answer["result"]] == ["cabe"]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"sample_rate": "16k"}, ("sample_rate", "'16k'", "8000 to 48000")),
        ({"phrase_list": ["cafe", "b" * 201]}, ("phrase_list[1]", "201", "at most 200")),
        ({"phrase_list": ["[unk]", " " * 4_000_000]}, ("phrase_list[1]", "4000000", "at most 200")),
        ({"phrase_list": ["bad\ud800"]}, ("phrase_list[0]", "4 characters", "surrogate", "at most 200")),
    ],
)
def test_vosk_names_what_is_wrong_in_a_config(
    server: LiveServer, config: dict[str, Any], named: tuple[str, ...]
) -> None:
    with connect(socket_url(server, "/vosk"), proxy=None) as socket:
        socket.send(json.dumps({"config": config}))
        error = json.loads(socket.recv(timeout=60))["error"]
        assert error["code"] == "invalid_value"
        assert all(part in error["message"] for part in named)


def test_vosk_answers_an_eof_beside_a_config_whose_nulls_say_nothing(server: LiveServer) -> None:
    with connect(socket_url(server, "/vosk"), proxy=None) as socket:
        nothing = {"words": None, "phrase_list": None, "model": None}
        socket.send(json.dumps({"config": {"sample_rate": SAMPLE_RATE_HZ, **nothing}}))
        socket.send(pcm(0.5, sing("cafe")))
        assert "partial" in json.loads(socket.recv(timeout=60))
        socket.send(json.dumps({"config": {"words": False}, "reset": 1}))
        assert json.loads(socket.recv(timeout=60)) == {"text": "cafe"}
        socket.send(pcm(0.5, sing("bad")))
        assert "partial" in json.loads(socket.recv(timeout=60))
        socket.send(json.dumps({"config": {"words": True}, "eof": 1}))
        answer = json.loads(socket.recv(timeout=60))
        assert (answer["text"], [word["word"] for word in answer["result"]]) == ("bad", ["bad"])
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=60)


def test_vosk_half_a_sample_before_a_reset_shifts_nothing(server: LiveServer) -> None:
    data = pcm(0.5, sing("bad cafe"))
    with connect(socket_url(server, "/vosk"), proxy=None) as socket:
        socket.send(json.dumps({"config": {"sample_rate": SAMPLE_RATE_HZ, "words": 0}}))
        # A reset with an utterance open, and one before it with none.
        for piece, text in (
            (bytes(4001), ""),
            (b"\0" + data + b"\0", "bad cafe"),
            (b"\0" + data, "bad cafe"),
        ):
            socket.send(piece)
            assert "partial" in json.loads(socket.recv(timeout=60))
            socket.send('{"reset": 1}')
            assert json.loads(socket.recv(timeout=60)) == {"text": text}


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("nonsense", "invalid_request"),
        ('{"what": 1}', "invalid_request"),
        ('{"config": 1}', "invalid_request"),
        ('{"config": {"sample_rate": 1}}', "invalid_value"),
        ('{"config": {"sample_rate": true}}', "invalid_value"),
        ('{"config": {"model": "../tiny"}}', "model_not_found"),
        ('{"config": {"phrase_list": "cafe"}}', "invalid_request"),
        ('{"config": {"model": 1}}', "invalid_request"),
        ('{"config": {"words": "false"}}', "invalid_request"),
        ('{"config": {"words": []}}', "invalid_request"),
    ],
)
def test_vosk_says_what_is_wrong_and_closes(
    server: LiveServer, client: httpx.Client, message: str, code: str
) -> None:
    counted = 'asr_requests_total{model="unknown",outcome="invalid",route="/vosk"}'
    before = metric(client, counted)
    with connect(socket_url(server, "/vosk"), proxy=None) as socket:
        socket.send(message)
        assert json.loads(socket.recv(timeout=60))["error"]["code"] == code
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(timeout=60)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1008
    assert metric(client, counted) == before + 1


# -- what goes wrong


def test_an_utterance_that_fails_does_so_once_after_its_end(models_dir: Path, tmp_path: Path) -> None:
    """Nothing is done before this deadline; the looks that fail too are nobody's business."""
    live = start(models_dir, tmp_path / "log", request_timeout_s=1e-6)
    try:
        with realtime(live) as session:
            session.listen()
            for part in (1.0, sing("head"), sing("bad"), 1.0):
                session.append(pcm(part))
            event = session.receive()
            kinds = [event["type"]]
            while event["type"] != f"{TRANSCRIPTION}.failed":
                event = session.receive()
                kinds.append(event["type"])
            assert kinds == [
                "input_audio_buffer.speech_started",
                "input_audio_buffer.speech_stopped",
                "input_audio_buffer.committed",
                f"{TRANSCRIPTION}.failed",
            ]
            assert event["error"]["code"] == "deadline_exceeded"
        with connect(socket_url(live, "/vosk"), proxy=None) as socket:
            socket.send(json.dumps({"config": {"sample_rate": SAMPLE_RATE_HZ}}))
            socket.send(SPEECH)
            assert json.loads(socket.recv(timeout=60))["error"]["code"] == "deadline_exceeded"
        with live.client() as http:
            wait_for_sessions(http, 0)
            lines = http.get("/metrics").text.splitlines()
        for route in ("/v1/realtime", "/vosk"):
            ends = f'outcome="timeout",route="{route}"}}'
            assert sum(float(line.rpartition(" ")[2]) for line in lines if ends in line) == 1, route
    finally:
        live.kill()


@pytest.mark.parametrize(
    ("first", "flood"), [(b"", b"\x89\x80\0\0\0\0"), (b"\x01\x80\0\0\0\0", b"\0\x80\0\0\0\0")]
)
def test_a_flood_of_pings_or_of_empty_fragments_is_cut_off(
    server: LiveServer, first: bytes, flood: bytes
) -> None:
    with realtime(server) as session:
        session.socket.socket.sendall(first + flood * 20_000)
        with pytest.raises(ConnectionClosed) as caught:
            session.socket.recv(timeout=30)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1008
    with server.client() as http:
        wait_for_sessions(http, 0)


# -- what operators see


def test_each_utterance_counts_as_a_request(models_dir: Path, tmp_path: Path, launch: Launch) -> None:
    live = launch(models_dir, tmp_path / "log")
    with realtime(live) as session:
        session.listen()
        session.append(SPEECH)
        assert [session.transcript() for _ in WORDS] == list(WORDS)
    vosk(live, SPEECH, {"sample_rate": SAMPLE_RATE_HZ})
    with live.client() as http:
        wait_for_sessions(http, 0)
        metrics = http.get("/metrics").text
    for route in ("/v1/realtime", "/vosk"):
        assert f'asr_requests_total{{model="tiny",outcome="ok",route="{route}"}} 3.0' in metrics
        assert f'asr_request_duration_seconds_count{{model="tiny",route="{route}"}} 3.0' in metrics
    lines = [line for line in live.log_lines() if line["event"] == "stream"]
    assert [(line["protocol"], line["model"], line["utterances"], line["end"]) for line in lines] == [
        ("realtime", "tiny", 3, "closed"),
        ("vosk", "tiny", 3, "closed"),
    ]
    assert all(word not in live.log for word in WORDS)


def break_off(socket: ClientConnection) -> None:
    socket.socket.shutdown(2)


ENDS: dict[str, tuple[str, Callable[[ClientConnection], object], str, int | None]] = {
    "good-bye": ("/v1/realtime", lambda socket: socket.close(), "closed", 1000),
    "leaving a page": ("/v1/realtime", lambda socket: socket.close(1001), "closed", 1001),
    "failing": ("/v1/realtime", lambda socket: socket.close(1011), "closed", 1011),
    "late pong": ("/vosk", lambda socket: socket.close(1011, PING_TIMEOUT), "ping_timeout", 1011),
    "broken off": ("/v1/realtime", break_off, "lost", 1006),
    "too large": ("/vosk", lambda socket: socket.send(bytes(5_000_000)), "message_too_large", 1009),
    "no frame": ("/vosk", lambda socket: socket.socket.sendall(b"\xff\xff"), "protocol_error", 1002),
    "eof": ("/vosk", lambda socket: socket.send('{"eof": 1}'), "closed", None),
    "nonsense": ("/vosk", lambda socket: socket.send("{"), "invalid", None),
}


@pytest.mark.parametrize(("path", "leave", "end", "code"), ENDS.values(), ids=ENDS)
def test_operators_see_how_a_session_ended(
    server: LiveServer, path: str, leave: Callable[[ClientConnection], object], end: str, code: int | None
) -> None:
    protocol = path.rpartition("/")[2]
    series = f'asr_stream_sessions_ended_total{{end="{end}",protocol="{protocol}"}}'
    with server.client() as http:
        wait_for_sessions(http, 0)
        before, seen = metric(http, series), len(server.log_lines())
        with connect(socket_url(server, path), proxy=None) as socket, contextlib.suppress(ConnectionClosed):
            leave(socket)
            while True:
                socket.recv(timeout=60)
        wait_for_sessions(http, 0)
        assert metric(http, series) == before + 1
    (line,) = [line for line in server.log_lines()[seen:] if line["event"] == "stream"]
    assert line["end"] == ("invalid_request" if end == "invalid" else end)
    assert line.get("close_code") == code


@pytest.mark.parametrize("path", ["/v1/realtime", "/vosk"])
def test_an_utterance_whose_caller_has_left_is_cancelled(server: LiveServer, path: str) -> None:
    series = f'asr_requests_total{{model="tiny",outcome="cancelled",route="{path}"}}'
    with server.client() as http:
        wait_for_sessions(http, 0)
        before = metric(http, series)
        for leave in (break_off, ClientConnection.close):
            with connect(socket_url(server, path), proxy=None) as socket:
                if path == "/vosk":
                    socket.send(json.dumps({"config": {"sample_rate": SAMPLE_RATE_HZ}}))
                    socket.send(pcm(0.5, sing("head")))
                    assert "partial" in json.loads(socket.recv(timeout=60))
                else:
                    session = Session(socket)
                    assert session.receive()["type"] == "session.created"
                    session.listen()
                    session.append(pcm(0.5, sing("head")))
                    session.until("input_audio_buffer.speech_started")
                    session.send("input_audio_buffer.clear")  # asked for, so not counted
                    session.append(pcm(0.5, sing("head")))
                    session.until("input_audio_buffer.speech_started")
                leave(socket)
        wait_for_sessions(http, 0)
        assert metric(http, series) == before + 2


def test_hotwords_that_the_model_cannot_spell_are_told_in_the_log_only(server: LiveServer) -> None:
    seen = len(server.log_lines())
    with realtime(server) as session:
        session.listen(transcription={"keywords": ["cafe", "Nguyen"]})
        session.listen(transcription={"keywords": ["cafe"]})
    with connect(socket_url(server, "/vosk"), proxy=None) as socket:
        socket.send(json.dumps({"config": {"phrase_list": ["Nguyen"]}}))
        socket.send(bytes(1000))
        assert "partial" in json.loads(socket.recv(timeout=60))
    lines = [line for line in server.log_lines()[seen:] if line["event"] == "hotwords_without_effect"]
    told = [(line["model"], line["given"], line["unspellable"], line["decoder"]) for line in lines]
    assert told == [("tiny", 2, 1, False), ("tiny", 1, 1, False)]
    assert "Nguyen" not in server.log


@pytest.mark.parametrize(
    ("path", "secret", "origin", "status", "code", "outcome"),
    [
        ("/v1/realtime", "", None, 401, "missing_api_key", "unauthorized"),
        ("/vosk", "wrong", None, 401, "invalid_api_key", "unauthorized"),
        ("/vosk", SECRET, "https://elsewhere.example", 403, "permission_denied", "unauthorized"),
        ("/v1/realtime?model=no", SECRET, None, 404, "model_not_found", "invalid"),
        ("/v1/realtime?intent=no", SECRET, None, 422, "invalid_value", "invalid"),
        ("/nope", SECRET, None, 404, "not_found", "invalid"),
    ],
)
def test_a_refused_session_is_counted_and_logged_like_a_request(
    guarded: LiveServer, path: str, secret: str, origin: str | None, status: int, code: str, outcome: str
) -> None:
    route = "unmatched" if path == "/nope" else path.partition("?")[0]
    requests = f'asr_requests_total{{model="unknown",outcome="{outcome}",route="{route}"}}'
    keys = {"authorization": f"Bearer {secret}"} if secret else {}
    with guarded.client(headers={"authorization": f"Bearer {SECRET}"}) as http:
        before, seen = metric(http, requests), len(guarded.log_lines())
        with pytest.raises(InvalidStatus) as caught:
            connect(socket_url(guarded, path), proxy=None, additional_headers=keys, origin=origin)
        assert metric(http, requests) == before + 1
        assert metric(http, "asr_inflight_requests") == 0
    (line,) = [line for line in guarded.log_lines()[seen:] if line.get("route") == route]
    told = (line["event"], line["method"], line["status"], line["outcome"], line["error_code"])
    assert told == ("request", "GET", status, outcome, code)
    assert line["request_id"] == caught.value.response.headers["x-request-id"]
    assert line.get("caller") == ("alice" if secret == SECRET and origin is None else None)


def test_a_session_that_is_open_is_no_request_under_way(guarded: LiveServer) -> None:
    header = {"authorization": f"Bearer {SECRET}"}
    with guarded.client(headers=header) as http:
        wait_for_sessions(http, 0)
        counted = [line for line in http.get("/metrics").text.splitlines() if "asr_requests" in line]
        with realtime(guarded, additional_headers=header):
            assert metric(http, "asr_inflight_requests") == 0
        wait_for_sessions(http, 0)
        assert counted == [line for line in http.get("/metrics").text.splitlines() if "asr_requests" in line]
        assert metric(http, "asr_inflight_requests") == 0


# -- the door and the limits


@pytest.fixture(scope="module")
def guarded(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    live = start(
        models_dir,
        tmp_path_factory.mktemp("guarded") / "log",
        api_keys=f"alice:{SECRET}",
        cors_origins="https://app.example",
        max_streams=1,
        stream_idle_timeout_s=1,
        stream_max_s=4,
    )
    yield live
    live.kill()


def refusal(server: LiveServer, **options: Any) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as caught:
        connect(socket_url(server, "/v1/realtime"), proxy=None, **options)
    response = caught.value.response
    return response.status_code, json.loads(response.body or b"")["error"]["code"]


def test_a_key_is_needed_and_a_browser_may_send_it_its_own_way(guarded: LiveServer) -> None:
    assert refusal(guarded) == (401, "missing_api_key")
    assert refusal(guarded, additional_headers={"authorization": "Bearer wrong"}) == (401, "invalid_api_key")
    header = {"authorization": f"Bearer {SECRET}"}
    offered = ["realtime", f"openai-insecure-api-key.{SECRET}"]
    for options in ({"additional_headers": header}, {"subprotocols": offered}):
        with guarded.client(headers=header) as http:
            wait_for_sessions(http, 0)
        with realtime(guarded, **options) as session:
            assert session.socket.subprotocol == ("realtime" if "subprotocols" in options else None)
    assert SECRET not in guarded.log


@pytest.mark.parametrize(
    ("path", "protocols", "selected"),
    [
        ("/v1/realtime", (), "key"),
        ("/vosk", (), "key"),
        ("/vosk", ("vosk",), "vosk"),
        ("/vosk", ("realtime",), "key"),
    ],
)
def test_one_of_the_offered_subprotocols_is_selected_as_browsers_demand(
    guarded: LiveServer, path: str, protocols: tuple[str, ...], selected: str
) -> None:
    with guarded.client(headers={"authorization": f"Bearer {SECRET}"}) as http:
        wait_for_sessions(http, 0)
    key = f"openai-insecure-api-key.{SECRET}"
    with connect(socket_url(guarded, path), proxy=None, subprotocols=[*protocols, key]) as socket:
        assert socket.subprotocol == (key if selected == "key" else selected)
    assert SECRET not in guarded.log


def test_pages_of_other_origins_are_kept_out(guarded: LiveServer) -> None:
    header = {"authorization": f"Bearer {SECRET}"}
    for origin in ("https://elsewhere.example", "null", "http://127.0.0.1", "http://127.0.0.1:1"):
        found = refusal(guarded, additional_headers=header, origin=origin)
        assert found == (403, "permission_denied")
    for origin in ("https://app.example", guarded.url):  # the second as websocket-client has it
        with guarded.client(headers=header) as http:
            wait_for_sessions(http, 0)
        with realtime(guarded, additional_headers=header, origin=origin):
            pass


def test_no_more_sessions_than_allowed_and_each_place_comes_back(guarded: LiveServer) -> None:
    header = {"authorization": f"Bearer {SECRET}"}
    with guarded.client(headers=header) as http:
        wait_for_sessions(http, 0)
        with realtime(guarded, additional_headers=header):
            assert refusal(guarded, additional_headers=header) == (429, "too_many_streams")
            assert 'asr_stream_sessions{protocol="realtime"} 1.0' in http.get("/metrics").text
        wait_for_sessions(http, 0)
        metrics = http.get("/metrics").text
    assert 'asr_rejections_total{reason="too_many_streams"} 1.0' in metrics
    assert 'asr_requests_total{model="unknown",outcome="rejected",route="/v1/realtime"} 1.0' in metrics
    assert 'asr_stream_sessions{protocol="realtime"} 0.0' in metrics


def test_a_silent_session_and_one_without_end_are_closed(guarded: LiveServer) -> None:
    header = {"authorization": f"Bearer {SECRET}"}
    for talks in (False, True):
        with guarded.client(headers=header) as http:
            wait_for_sessions(http, 0)
        with realtime(guarded, additional_headers=header) as session:
            while True:
                if talks:
                    session.append(bytes(1600))
                try:
                    event = json.loads(session.socket.recv(timeout=0.2 if talks else 60))
                except TimeoutError:
                    continue
                if event["type"] == "error":
                    break
            assert event["error"]["code"] == "stream_timeout"
            assert ("4 seconds" if talks else "1 seconds") in event["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/realtime", "/vosk"])
def test_a_session_that_has_lasted_too_long_tells_what_it_heard(guarded: LiveServer, path: str) -> None:
    header = {"authorization": f"Bearer {SECRET}"}
    with guarded.client(headers=header) as http:
        wait_for_sessions(http, 0)
    told = []
    with connect(socket_url(guarded, path), proxy=None, additional_headers=header) as socket:
        if path == "/vosk":
            socket.send(json.dumps({"config": {"sample_rate": SAMPLE_RATE_HZ, "words": False}}))
            socket.send(pcm(0.5, sing("cafe")))
        else:
            session = Session(socket)
            assert session.receive()["type"] == "session.created"
            session.listen()
            session.append(pcm(0.5, sing("cafe")))
        with contextlib.suppress(ConnectionClosed):
            while True:
                told.append(json.loads(socket.recv(timeout=60)))
    assert told[-1]["error"]["code"] == "stream_timeout"
    assert "cafe" in (told[-2].get("text"), told[-2].get("transcript"))


def test_who_leaves_in_the_middle_leaves_nothing_behind(server: LiveServer) -> None:
    with server.client() as http:
        wait_for_sessions(http, 0)
        for _ in range(5):
            with realtime(server) as session:
                session.listen()
                session.append(pcm(0.5, sing("head bad cafe")))
                session.socket.socket.close()  # no goodbye
        wait_for_sessions(http, 0)
        assert http.post("/transcribe", files={"file": b""}).status_code == 400  # still there
    assert "unhandled_exception" not in server.log


def test_what_was_heard_is_told_when_the_service_stops(
    models_dir: Path, tmp_path: Path, launch: Launch
) -> None:
    live = launch(models_dir, tmp_path / "log")
    with realtime(live) as session, connect(socket_url(live, "/vosk"), proxy=None) as other:
        session.listen()
        session.append(pcm(0.5, sing("head bad")))
        session.until("input_audio_buffer.speech_started")
        other.send(json.dumps({"config": {"sample_rate": SAMPLE_RATE_HZ}}))
        other.send(pcm(0.5, sing("cafe")))
        assert "partial" in json.loads(other.recv(timeout=60))
        live.process.send_signal(signal.SIGTERM)
        assert session.transcript() == "head bad"
        assert session.until("error")["error"]["code"] == "draining"
        assert json.loads(other.recv(timeout=60))["text"] == "cafe"
        assert json.loads(other.recv(timeout=60))["error"]["code"] == "draining"
        for socket in (session.socket, other):
            with pytest.raises(ConnectionClosed) as caught:
                socket.recv(timeout=60)
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1012
    assert live.process.wait(60) == 0


def flood(session: Session) -> None:
    with contextlib.suppress(ConnectionClosed, OSError):
        for _ in range(5):
            session.send("x", event_id="y" * 4_000_000)


def test_a_second_signal_does_not_wait_for_who_does_not_read(
    models_dir: Path, tmp_path: Path, launch: Launch
) -> None:
    live = launch(models_dir, tmp_path / "log", drain_timeout_s=600)
    with realtime(live, max_queue=1, max_size=None) as session, live.client() as http:
        session.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # Until the answers that nobody takes fill every buffer, and the server reads no more: sending blocks.
        threading.Thread(target=flood, args=(session,), daemon=True).start()
        time.sleep(1)
        assert sessions(http) == 1
        live.process.send_signal(signal.SIGTERM)
        time.sleep(1)  # the stop has begun
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(60) == 0
