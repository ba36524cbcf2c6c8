"""Everything people send by mistake: the right status, the envelope, a message that helps, and on it goes."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import soundfile

from loadtest.processes import LiveServer
from tests.api.test_audio import KINDS, encode, file_of, tone
from tests.tiny_bundle import recite, sing, wav

ROUTES = ["/transcribe", "/v1/audio/transcriptions"]


@pytest.fixture(autouse=True)
def _goes_on_serving(client: httpx.Client) -> Iterator[None]:
    yield
    response = client.post("/transcribe", files={"file": wav(sing("abc"))})
    assert response.json()["text"] == "abc"


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def send(client: httpx.Client, route: str, audio: bytes, **fields: object) -> httpx.Response:
    return client.post(route, data={"model": "tiny", **fields}, files={"file": ("speech.wav", audio)})


def refused(response: httpx.Response, status: int, code: str, *words: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    for word in words:
        assert word in error["message"]


def test_empty_file(client: httpx.Client, route: str) -> None:
    refused(send(client, route, b""), 400, "empty_file", "empty")


def test_text_renamed_to_wav(client: httpx.Client, route: str) -> None:
    refused(send(client, route, b"Dear Sir or Madam,\n" * 99), 400, "undecodable_audio", "Formats: wav, flac")


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_files(client: httpx.Client, kind: str) -> None:
    rate_hz = 48_000 if kind in ("opus", "webm") else 44_100
    hiss = np.random.default_rng(0).normal(0, 0.02, 3 * rate_hz).astype(np.float32)
    data = file_of(kind, tone(1000, rate_hz, 3.0) * (hiss > 0) + hiss, rate_hz)
    response = send(client, "/transcribe", data[: len(data) // 2])
    if kind in ("m4a", "mp4"):
        refused(response, 400, "undecodable_audio", "Formats:")
    else:
        assert response.status_code == 200
        assert 0.5 < response.json()["duration"] < 2.9
        assert ("warnings" in response.json()) == (kind in ("wav", "flac"))


@pytest.mark.parametrize("kind", KINDS)
def test_files_cut_inside_their_header(client: httpx.Client, route: str, kind: str) -> None:
    rate_hz = 48_000 if kind in ("opus", "webm") else 44_100
    data = file_of(kind, tone(1000, rate_hz), rate_hz)
    response = send(client, route, data[:40])
    assert response.status_code == 400
    assert response.json()["error"]["code"] in ("undecodable_audio", "no_audio_samples")


def test_wav_header_that_claims_four_gigabytes(client: httpx.Client) -> None:
    data = bytearray(wav(sing("abc")))
    struct.pack_into("<I", data, 4, 0xFFFFFFFF)
    struct.pack_into("<I", data, data.index(b"data") + 4, 0xFFFFFFFF)
    response = send(client, "/transcribe", bytes(data))
    assert response.json()["text"] == "abc"
    assert response.json()["duration"] == pytest.approx(len(sing("abc")) / 16_000, abs=1e-4)


def test_eight_channels_at_192_khz_in_float(client: httpx.Client) -> None:
    samples = np.repeat(sing("head", sample_rate_hz=192_000)[:, None], 8, axis=1)
    assert send(client, "/transcribe", wav(samples, 192_000, "FLOAT")).json()["text"] == "head"


def test_zero_length_stream(client: httpx.Client, route: str) -> None:
    refused(send(client, route, wav(np.zeros(0, np.float32))), 400, "no_audio_samples", "no audio samples")


def test_video_without_sound(client: httpx.Client, route: str) -> None:
    silent_film = encode("mp4", tone(1000, 44_100), video=True, audio=False)
    refused(send(client, route, silent_film), 400, "no_audio_stream", "no audio stream")


def test_video_with_sound_is_heard(client: httpx.Client) -> None:
    film = encode("mp4", sing("head bad", sample_rate_hz=44_100), video=True)
    assert send(client, "/transcribe", film).json()["text"] == "head bad"


def test_nan_samples(client: httpx.Client, route: str) -> None:
    samples = sing("abc")
    samples[3000] = np.nan
    refused(send(client, route, wav(samples, subtype="FLOAT")), 400, "not_finite_samples", "NaN")


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(80_000, np.float32),
        np.random.default_rng(1).normal(0, 0.1, 80_000).astype(np.float32),
        np.zeros(1, np.float32),
    ],
    ids=["silence", "noise", "one sample"],
)
def test_silence_and_noise_give_empty_text(client: httpx.Client, samples: np.ndarray) -> None:
    body = send(client, "/transcribe", wav(samples)).json()
    assert body["text"] == ""
    assert body["confidence"] is None
    assert body["words"] == []
    assert body["duration"] == pytest.approx(len(samples) / 16_000, abs=1e-5)
    for kind in ("srt", "vtt", "text", "json", "verbose_json"):
        response = send(client, "/v1/audio/transcriptions", wav(samples), response_format=kind)
        assert response.status_code == 200


def test_longer_than_the_cap(client: httpx.Client, route: str) -> None:
    """An hour of silence is a small flac; the cap of this server is ten minutes of decoded samples."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(8_000 * 3600, np.int16), 8_000, format="FLAC")
    refused(send(client, route, file.getvalue()), 422, "audio_too_long", "600 seconds")


def test_minutes_of_speech_are_no_mistake(client: httpx.Client) -> None:
    sentences = ["head bad cafe", "abc", "fade"] * 60
    samples = recite(sentences)
    body = send(client, "/transcribe", wav(samples)).json()
    assert body["text"] == " ".join(sentences)
    assert body["duration"] == pytest.approx(len(samples) / 16_000, abs=1e-3)


def test_missing_and_misnamed_file_fields(client: httpx.Client, route: str) -> None:
    refused(client.post(route, data={"model": "tiny"}, files={"x": (None, "1")}), 400, "invalid_request", "x")
    misnamed = client.post(route, data={"model": "tiny"}, files={"audio": ("a.wav", wav(sing("a")))})
    refused(misnamed, 400, "invalid_request", "'audio'", "'file'")
    as_text = client.post(route, files={"model": (None, "tiny"), "file": (None, "hello")})
    refused(as_text, 400, "invalid_request", "file part")


def test_missing_model_names_the_field(client: httpx.Client) -> None:
    response = client.post("/v1/audio/transcriptions", files={"file": wav(sing("a"))})
    refused(response, 400, "invalid_request", "model")
    assert response.json()["error"]["param"] == "model"


def test_wrong_field_names(client: httpx.Client, route: str) -> None:
    response = send(client, route, wav(sing("a")), langauge="en")
    refused(response, 400, "invalid_request", "langauge", "language")


def test_repeated_fields(client: httpx.Client, route: str) -> None:
    refused(send(client, route, wav(sing("a")), language=["en", "tr"]), 400, "invalid_request", "twice")


def test_unknown_model(client: httpx.Client, route: str) -> None:
    refused(send(client, route, wav(sing("a")), model="gpt-4"), 404, "model_not_found", "tiny", "other")


@pytest.mark.parametrize("name", ["../tiny", "/etc/passwd", "tiny\x00", "..%2ftiny", "x" * 5000])
def test_model_names_are_never_paths(client: httpx.Client, route: str, name: str) -> None:
    response = send(client, route, wav(sing("a")), model=name)
    assert response.status_code in (404, 422)
    assert "No such file" not in response.text


def test_unknown_language(client: httpx.Client, route: str) -> None:
    response = send(client, route, wav(sing("a")), language="vi")
    refused(response, 422, "unsupported_language", "'vi'", "en, tr")


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"beam": "many"}, 400),
        ({"beam": "1.5"}, 400),
        ({"beam": "-1"}, 422),
        ({"beam": "100000"}, 422),
        ({"timestamps": "perhaps"}, 400),
        ({"format": "docx"}, 422),
        ({"hotwords[]": ["w"] * 1001}, 422),
        ({"hotwords[]": "x" * 300}, 422),
        ({"language": "e"}, 422),
    ],
)
def test_wrong_types_and_ranges(client: httpx.Client, fields: dict[str, object], status: int) -> None:
    response = send(client, "/transcribe", wav(sing("a")), **fields)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["param"].startswith(next(iter(fields)).removesuffix("[]"))
    assert error["message"]


def test_not_multipart(client: httpx.Client, route: str) -> None:
    refused(client.post(route, json={"model": "tiny"}), 400, "invalid_request", "multipart/form-data")
    refused(client.post(route), 400, "invalid_request", "multipart/form-data")
    refused(client.post(route, content=wav(sing("a"))), 400, "invalid_request", "multipart/form-data")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        b"--b\r\n\r\nno headers\r\n--b--",
        b"--b\r\nContent-Disposition: form-data\r\n\r\nno name\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nRIFF',
        b"\x00" * 1000,
        b'--b\r\nContent-Disposition: form-data; name="' + b"n" * 20_000 + b'"\r\n\r\n1\r\n--b--\r\n',
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + b"m" * 100_000 + b"\r\n--b--\r\n",
    ],
)
def test_malformed_multipart(client: httpx.Client, route: str, body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    refused(client.post(route, content=body, headers=headers), 400, "invalid_request")


def test_content_type_lies_do_not_matter(client: httpx.Client) -> None:
    for content_type in ("image/png", "text/plain", "application/x-evil", ""):
        files = {"file": ("holiday.png", wav(sing("abc")), content_type)}
        assert client.post("/transcribe", files=files).json()["text"] == "abc"


@pytest.mark.parametrize("chunked", [False, True])
def test_over_the_byte_limit(client: httpx.Client, route: str, chunked: bool, server: LiveServer) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    )
    size = 27 * 2**20
    headers = {"content-type": "multipart/form-data; boundary=b"}
    if not chunked:
        headers["content-length"] = str(len(body) + size + len(b"\r\n--b--\r\n"))

    def pieces() -> Iterator[bytes]:
        yield body
        for _ in range(size // 2**16):
            yield b"\0" * 2**16
        yield b"\r\n--b--\r\n"

    response = client.post(route, content=pieces(), headers=headers)
    refused(response, 413, "upload_too_large", "26214400 bytes", "25.0 MiB")
