"""The official client against the live service: every field, every format, errors, retries."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import openai
import pytest

from loadtest.processes import LiveServer
from tests.tiny_bundle import recite, sing, wav

TEXT = "head bad cafe"


@pytest.fixture(scope="module")
def audio() -> tuple[str, bytes]:
    return ("speech.wav", wav(sing(TEXT)))


@pytest.fixture(scope="module")
def long_audio() -> tuple[str, bytes]:
    return ("long.wav", wav(recite([TEXT] * 8)))


@pytest.fixture
def ai(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_json(ai: openai.OpenAI, audio: tuple[str, bytes]) -> None:
    result = ai.audio.transcriptions.create(model="whisper-1", file=audio)
    assert result.text == TEXT
    assert result.usage is not None
    assert result.usage.type == "duration"
    assert result.usage.seconds == pytest.approx(len(sing(TEXT)) / 16_000, abs=1e-3)
    assert result.logprobs is None


def test_by_name_and_language(ai: openai.OpenAI, audio: tuple[str, bytes]) -> None:
    assert ai.audio.transcriptions.create(model="other", language="vi", file=audio).text == TEXT


def test_verbose_json_has_computed_segments(ai: openai.OpenAI, audio: tuple[str, bytes]) -> None:
    result = ai.audio.transcriptions.create(model="tiny", file=audio, response_format="verbose_json")
    assert result.text == TEXT
    assert result.language == "english"
    assert isinstance(result.duration, float)
    assert result.words is None
    assert result.segments is not None
    segment = result.segments[0]
    assert " ".join(part.text for part in result.segments) == TEXT
    assert segment.start == pytest.approx(0.1, abs=0.03)
    assert result.segments[-1].end == pytest.approx(result.duration - 0.16, abs=0.05)
    assert len(segment.tokens) == len(segment.text)
    assert -0.05 < segment.avg_logprob <= 0
    assert segment.no_speech_prob < 0.01
    assert segment.compression_ratio > 0
    assert segment.temperature == 0


@pytest.mark.parametrize(
    ("granularities", "words", "segments"),
    [(["word"], True, False), (["segment"], False, True), (["word", "segment"], True, True)],
)
def test_timestamp_granularities(
    ai: openai.OpenAI, audio: tuple[str, bytes], granularities: list[str], words: bool, segments: bool
) -> None:
    result = ai.audio.transcriptions.create(
        model="tiny",
        file=audio,
        response_format="verbose_json",
        timestamp_granularities=granularities,  # type: ignore[arg-type]
    )
    assert (result.words is not None, result.segments is not None) == (words, segments)
    if result.words:
        assert [word.word for word in result.words] == TEXT.split()
        times = [time for word in result.words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert result.words[1].start == pytest.approx(0.1 + 5 * 0.14, abs=0.03)


@pytest.mark.parametrize("kind", ["text", "srt", "vtt"])
def test_raw_formats_are_not_json(ai: openai.OpenAI, audio: tuple[str, bytes], kind: str) -> None:
    result = ai.audio.transcriptions.create(model="tiny", file=audio, response_format=kind)  # type: ignore[call-overload]
    assert isinstance(result, str)
    assert TEXT in result
    assert '"' not in result
    if kind == "srt":
        assert result.startswith("1\n00:00:00,1")
    if kind == "vtt":
        assert result.startswith("WEBVTT\n\n00:00:00.1")


def test_content_types_of_raw_formats(client: httpx.Client, audio: tuple[str, bytes]) -> None:
    kinds = {
        "text": "text/plain",
        "srt": "application/x-subrip",
        "vtt": "text/vtt",
        "json": "application/json",
    }
    for kind, content_type in kinds.items():
        response = client.post(
            "/v1/audio/transcriptions",
            data={"model": "tiny", "response_format": kind},
            files={"file": audio},
            headers={"accept": "application/json"},
        )
        assert response.headers["content-type"].startswith(content_type)


def test_logprobs_spell_the_text(ai: openai.OpenAI, audio: tuple[str, bytes]) -> None:
    result = ai.audio.transcriptions.create(model="tiny", file=audio, include=["logprobs"])
    assert result.logprobs is not None
    assert "".join(entry.token or "" for entry in result.logprobs) == TEXT
    for entry in result.logprobs:
        assert entry.logprob is not None
        assert -1 < entry.logprob <= 0
        assert bytes(int(byte) for byte in entry.bytes or []).decode() == entry.token


def test_logprobs_spell_the_text_of_a_long_file(ai: openai.OpenAI, long_audio: tuple[str, bytes]) -> None:
    """Over the borders of windows too, in the plain answer, each delta and the last event."""
    result = ai.audio.transcriptions.create(model="tiny", file=long_audio, include=["logprobs"])
    assert result.text == " ".join([TEXT] * 8)
    assert "".join(entry.token or "" for entry in result.logprobs or []) == result.text
    deltas = 0
    with ai.audio.transcriptions.create(
        model="tiny", file=long_audio, include=["logprobs"], stream=True
    ) as stream:
        for event in stream:
            text = event.delta if event.type == "transcript.text.delta" else event.text
            assert "".join(entry.token or "" for entry in event.logprobs or []) == text
            deltas += event.type == "transcript.text.delta"
    assert deltas >= 3


def test_prompt_and_temperature_are_accepted(ai: openai.OpenAI, audio: tuple[str, bytes]) -> None:
    result = ai.audio.transcriptions.create(model="tiny", file=audio, prompt="names: Ada", temperature=0.7)
    assert result.text == TEXT


def test_keywords_are_accepted(ai: openai.OpenAI, audio: tuple[str, bytes]) -> None:
    result = ai.audio.transcriptions.create(
        model="tiny", file=audio, extra_body={"keywords": ["cafe", "bad"]}
    )
    assert result.text == TEXT


def test_chunking_auto(ai: openai.OpenAI, audio: tuple[str, bytes]) -> None:
    assert ai.audio.transcriptions.create(model="tiny", file=audio, chunking_strategy="auto").text == TEXT


def test_server_vad_cuts_at_pauses(ai: openai.OpenAI, client: httpx.Client) -> None:
    pause = np.zeros(16_000, np.float32)
    spoken = np.concatenate([pause, sing("abc"), pause, sing("de"), pause])
    file = ("pauses.wav", wav(spoken))
    result = ai.audio.transcriptions.create(
        model="tiny",
        file=file,
        response_format="verbose_json",
        chunking_strategy={
            "type": "server_vad",
            "threshold": 0.5,
            "prefix_padding_ms": 100,
            "silence_duration_ms": 300,
        },
    )
    assert result.segments is not None
    assert [segment.text for segment in result.segments] == ["abc", "de"]
    seeks = [segment.seek for segment in result.segments]
    assert seeks[0] == pytest.approx(100, abs=4)  # speech begins at 1.1 s, 100 ms of padding before it
    assert seeks[1] > seeks[0]
    as_json = client.post(
        "/v1/audio/transcriptions",
        data={"model": "tiny", "chunking_strategy": json.dumps({"type": "server_vad"})},
        files={"file": file},
    )
    assert as_json.json()["text"] == "abc de"


def test_stream(ai: openai.OpenAI, long_audio: tuple[str, bytes]) -> None:
    deltas, done = [], None
    with ai.audio.transcriptions.create(model="tiny", file=long_audio, stream=True) as stream:
        for event in stream:
            if event.type == "transcript.text.delta":
                assert done is None
                deltas.append(event.delta)
            elif event.type == "transcript.text.done":
                done = event
    assert done is not None
    assert done.text == " ".join([TEXT] * 8)
    assert "".join(deltas) == done.text
    assert len(deltas) >= 3, "the text must come in pieces"


def test_stream_with_logprobs_ends_with_the_sentinel(client: httpx.Client, audio: tuple[str, bytes]) -> None:
    with client.stream(
        "POST",
        "/v1/audio/transcriptions",
        data={"model": "tiny", "stream": "true", "include[]": "logprobs"},
        files={"file": audio},
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert [event["type"] for event in events][-1] == "transcript.text.done"
    assert all("logprobs" in event for event in events)
    assert events[-1]["usage"]["type"] == "duration"


def test_stream_of_what_is_no_audio_is_an_ordinary_error(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ai.audio.transcriptions.create(model="tiny", file=("a.wav", b"hello" * 100), stream=True)
    assert caught.value.code == "undecodable_audio"


def test_models(ai: openai.OpenAI) -> None:
    names = {model.id for model in ai.models.list()}
    assert names == {"tiny", "other", "whisper-1"}
    model = ai.models.retrieve("tiny")
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "asr-platform")
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("gpt-4o-transcribe")


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "gpt-4o-transcribe"}, openai.NotFoundError, "model"),
        ({"language": "xx"}, openai.UnprocessableEntityError, "language"),
        ({"language": "english"}, openai.UnprocessableEntityError, "language"),
        ({"temperature": 7}, openai.UnprocessableEntityError, "temperature"),
        ({"response_format": "xml"}, openai.UnprocessableEntityError, "response_format"),
        ({"timestamp_granularities": ["year"]}, openai.UnprocessableEntityError, "timestamp_granularities"),
        ({"include": ["everything"]}, openai.UnprocessableEntityError, "include"),
        ({"extra_body": {"temprature": 0}}, openai.BadRequestError, "temprature"),
        ({"extra_body": {"stream": "maybe"}}, openai.BadRequestError, "stream"),
        (
            {"chunking_strategy": {"type": "server_vad", "threshold": 3}},
            openai.UnprocessableEntityError,
            "chunk",
        ),
    ],
)
def test_errors_reach_the_client_with_type_param_and_code(
    ai: openai.OpenAI,
    audio: tuple[str, bytes],
    fields: dict[str, object],
    error: type[openai.APIStatusError],
    param: str,
) -> None:
    with pytest.raises(error) as caught:
        ai.audio.transcriptions.create(**{"model": "tiny", "file": audio, **fields})  # type: ignore[call-overload]
    assert param in str(caught.value.param)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.code
    assert caught.value.request_id
    assert len(caught.value.message) > 20


def test_unknown_routes_have_the_envelope(client: httpx.Client) -> None:
    for method, path in [("GET", "/v1/nothing"), ("POST", "/v1/models"), ("GET", "/nothing")]:
        response = client.request(method, path)
        assert response.status_code in (404, 405)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.headers["x-request-id"]


class _Busy(BaseHTTPRequestHandler):
    """Refuses twice the way the service does, then hands over to it."""

    refusals = 0
    target = ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if type(self).refusals < 2:
            type(self).refusals += 1
            self.send_response(429)
            self.send_header("retry-after-ms", "50")
            self.send_header("content-length", "0")
            self.end_headers()
            return
        headers = {"content-type": self.headers["content-type"]}
        answer = httpx.post(self.target + self.path, content=body, headers=headers)
        self.send_response(answer.status_code)
        self.send_header("content-type", answer.headers["content-type"])
        self.send_header("content-length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, *_: object) -> None:
        pass


def test_client_retries_what_the_service_refuses_and_succeeds(
    server: LiveServer, audio: tuple[str, bytes]
) -> None:
    _Busy.target, _Busy.refusals = server.url, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), _Busy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{proxy.server_port}/v1"
            with openai.OpenAI(base_url=url, api_key="unused") as ai:
                assert ai.audio.transcriptions.create(model="tiny", file=audio).text == TEXT
        finally:
            proxy.shutdown()
            thread.join()
    assert _Busy.refusals == 2
