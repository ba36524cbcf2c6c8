"""The project's own routes on the live service."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import pytest
from websockets.sync.client import connect

from api.schemas import BatchBody, TranscriptionBody
from loadtest.processes import LiveServer
from tests.api.test_audio import KINDS, file_of
from tests.tiny_bundle import recite, sing, wav

TEXT = "head bad cafe"
AUDIO = wav(sing(TEXT))


def post(client: httpx.Client, data: dict[str, object] | None = None, audio: bytes = AUDIO) -> httpx.Response:
    return client.post("/transcribe", data=data, files={"file": ("a.bin", audio)})


def test_transcribe_answers_what_the_contract_says(client: httpx.Client) -> None:
    response = post(client)
    body = response.json()
    assert response.status_code == 200
    assert set(body) == {
        "id", "text", "duration", "processing_time", "real_time_factor", "language", "model", "timestamp",
        "confidence", "words", "segments",
    }  # fmt: skip
    assert TranscriptionBody.model_validate(body).model_dump(exclude_unset=True) == body  # as documented
    assert body["text"] == TEXT
    assert body["id"] == response.headers["x-request-id"]
    assert body["duration"] == pytest.approx(len(sing(TEXT)) / 16_000, abs=1e-4)
    # All three are given in millionths; a clip of a second takes less than a thousandth of it.
    assert body["real_time_factor"] == pytest.approx(body["processing_time"] / body["duration"], abs=2e-6)
    assert (body["language"], body["model"]) == ("en", "tiny")
    assert abs(datetime.fromisoformat(body["timestamp"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert body["confidence"] > 0.99
    assert [word["word"] for word in body["words"]] == TEXT.split()
    assert body["segments"][0]["id"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_text(client: httpx.Client, kind: str) -> None:
    rate_hz = 48_000 if kind in ("opus", "webm") else 44_100
    response = post(client, audio=file_of(kind, sing(TEXT, sample_rate_hz=rate_hz), rate_hz))
    assert response.json()["text"] == TEXT


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_channels_are_mixed_down(client: httpx.Client, channels: int) -> None:
    samples = np.repeat(sing(TEXT)[:, None], channels, axis=1)
    assert post(client, audio=wav(samples)).json()["text"] == TEXT


def test_duration_is_never_clamped(client: httpx.Client) -> None:
    body = post(client, audio=wav(sing("a", lead_s=0.02))).json()
    assert body["duration"] == pytest.approx(0.18, abs=0.001)


def test_without_timestamps_words_and_segments_stay_out(client: httpx.Client) -> None:
    body = post(client, {"timestamps": "false"}).json()
    assert "words" not in body
    assert "segments" not in body


@pytest.mark.parametrize("fields", [{"beam": "16"}, {"hotwords[]": ["cafe", "bad"]}, {"hotwords": "cafe"}])
def test_beam_and_hotwords(client: httpx.Client, fields: dict[str, object]) -> None:
    assert post(client, fields).json()["text"] == TEXT


def test_hotwords_change_what_is_ambiguous(client: httpx.Client) -> None:
    """Between two tones, at equal strength, the hotword decides."""
    mixed = np.concatenate([sing("ca"), (sing("b") + sing("d")) / 2, sing("e")])
    first = post(client, {"hotwords[]": ["cabe"]}, audio=wav(mixed)).json()["text"]
    second = post(client, {"hotwords[]": ["cade"]}, audio=wav(mixed)).json()["text"]
    assert (first, second) == ("cabe", "cade")


def test_greedy_decoding_has_no_use_for_hotwords(client: httpx.Client) -> None:
    response = post(client, {"hotwords[]": ["cafe"], "beam": "0"})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "beam"
    assert "leave beam out, or give a width from 1 to 64" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "start"), [("text", TEXT), ("srt", "1\n00:00:00,1"), ("vtt", "WEBVTT\n\n00:00:00.1")]
)
def test_raw_formats(client: httpx.Client, kind: str, start: str) -> None:
    response = post(client, {"format": kind})
    assert response.text.startswith(start)
    assert TEXT in response.text


def test_long_files_keep_their_times(client: httpx.Client) -> None:
    sentences = ["abc", "de", "fgh"] * 4
    body = post(client, audio=wav(recite(sentences, pause_s=0.9))).json()
    assert body["text"] == " ".join(sentences)
    offset_s = 0.0
    for word, sentence in zip(body["words"], sentences, strict=True):
        assert word["start"] == pytest.approx(offset_s + 0.1, abs=0.03)
        offset_s += len(sing(sentence + " ")) / 16_000 + 0.9
    assert [segment["text"] for segment in body["segments"]] == sentences


def test_stream_of_our_own_route(client: httpx.Client) -> None:
    with client.stream(
        "POST", "/transcribe", data={"stream": "true"}, files={"file": wav(recite([TEXT] * 6))}
    ) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(event.get("delta", "") for event in events) == " ".join([TEXT] * 6)


def test_stream_events_of_our_own_route_carry_times_and_the_whole_answer(client: httpx.Client) -> None:
    form = {"stream": "true", "timestamps": "true"}
    with client.stream("POST", "/transcribe", data=form, files={"file": wav(recite([TEXT] * 6))}) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    *deltas, done = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {event["type"] for event in deltas} == {"transcript.text.delta"}
    times = [(event["start"], event["end"]) for event in deltas]
    assert times == sorted(times)
    assert all(start < end for start, end in times)
    assert done["type"] == "transcript.text.done"
    assert done["text"] == " ".join([TEXT] * 6)
    assert [word["word"] for word in done["words"]] == done["text"].split()
    assert {"decode", "queue", "inference", "ctc"} <= set(done["timings"])


def test_batch_answers_in_order_with_errors_in_their_place(client: httpx.Client) -> None:
    files = [
        ("files", ("one.wav", wav(sing("abc")))),
        ("files", ("bad.wav", b"no audio" * 50)),
        ("files", ("two.flac", file_of("flac", sing("de"), 16_000))),
        ("files", ("silence.wav", wav(np.zeros(16_000, np.float32)))),
    ]
    response = client.post("/transcribe/batch", files=files, data={"model": "other"})
    body = response.json()
    assert response.status_code == 200
    assert BatchBody.model_validate(body).model_dump(exclude_unset=True) == body  # as documented
    assert [item["index"] for item in body["results"]] == [0, 1, 2, 3]
    assert [item["filename"] for item in body["results"]] == [name for _, (name, _) in files]
    assert body["results"][0]["transcription"]["text"] == "abc"
    assert body["results"][1]["error"]["code"] == "undecodable_audio"
    assert "transcription" not in body["results"][1]
    assert set(body["results"][1]["error"]) == {"message", "type", "param", "code"}
    assert body["results"][2]["transcription"]["text"] == "de"
    silence = body["results"][3]["transcription"]
    assert silence["confidence"] is None  # as the single route says it
    assert set(silence) == set(client.post("/transcribe", files={"file": files[3][1]}).json())
    assert (body["succeeded"], body["failed"]) == (3, 1)


def test_a_refused_file_of_a_batch_is_counted_by_its_reason(client: httpx.Client) -> None:
    """The request itself is answered well, so nothing else would tell of it."""

    def refused() -> float:
        lines = client.get("/metrics").text.splitlines()
        found = next(
            line for line in lines if line.startswith('asr_rejections_total{reason="audio_too_long"')
        )
        return float(found.rpartition(" ")[2])

    before = refused()
    silence = file_of("flac", np.zeros(601 * 16_000, np.float32), 16_000)
    files = [
        ("files", ("a.wav", AUDIO)),
        ("files", ("b.flac", silence)),
        ("files", ("c.wav", b"no audio" * 50)),
    ]
    body = client.post("/transcribe/batch", files=files).json()
    assert [item.get("error", {}).get("code") for item in body["results"]] == [
        None,
        "audio_too_long",
        "undecodable_audio",
    ]
    assert refused() == before + 1


@pytest.mark.parametrize(
    ("files", "data", "status", "param"),
    [
        ([], {"model": "tiny"}, 400, "x"),
        ([("files", ("a.wav", AUDIO))], {"format": "srt"}, 400, "format"),
        ([("files", ("a.wav", AUDIO))], {"stream": "true"}, 400, "stream"),
        ([("sound", ("a.wav", AUDIO))], {}, 400, "files"),
        ([("files", ("a.wav", AUDIO))] * 17, {}, 400, "files"),
        ([("files", ("a.wav", AUDIO))], {"model": "none"}, 404, "model"),
        ([("files", ("a.wav", AUDIO))], {"beam": "9999"}, 422, "beam"),
    ],
)
def test_bad_batches(
    client: httpx.Client,
    files: list[tuple[str, tuple[str, bytes]]],
    data: dict[str, str],
    status: int,
    param: str,
) -> None:
    response = client.post("/transcribe/batch", files=files or {"x": (None, b"1")}, data=data)
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert response.json()["error"]["param"] == param


def test_a_batch_in_a_language_that_the_model_does_not_know_is_refused_whole(client: httpx.Client) -> None:
    files = [("files", ("one.wav", AUDIO)), ("files", ("two.wav", AUDIO))]
    response = client.post("/transcribe/batch", files=files, data={"language": "fr"})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "unsupported_language")


def test_a_large_file_without_a_filename_is_told_apart_from_a_field(client: httpx.Client) -> None:
    response = client.post("/transcribe", files={"file": (None, bytes(100_000))})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "Field 'file' must be a file part (with a filename)."


def test_a_field_in_the_query_is_refused(client: httpx.Client) -> None:
    files = {"file": ("a.wav", AUDIO)}
    for path, name in (
        ("/transcribe", "format"),
        ("/transcribe/batch", "model"),
        ("/v1/audio/transcriptions", "response_format"),
    ):
        response = client.post(path, params={name: "srt"}, files=files, data={"model": "tiny"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name


def test_information_routes(client: httpx.Client) -> None:
    root = client.get("/").json()
    assert root["status"] == "ready"
    for link in root["links"].values():
        assert client.get(link).status_code in (200, 405), link
    for path in root["websockets"].values():
        with connect(f"ws://{client.base_url.netloc.decode()}{path}", proxy=None):
            pass
    models = client.get("/models").json()
    assert [model["name"] for model in models["models"]] == ["tiny", "other"]
    assert models["aliases"] == {"whisper-1": "tiny"}
    assert models["models"][0]["default"] is True
    assert models["models"][0]["engine"]["workers"] >= 1
    languages = {entry["code"]: entry["models"] for entry in client.get("/languages").json()["languages"]}
    assert languages == {"en": ["tiny"], "tr": ["tiny"], "vi": ["other"]}


def test_probes(client: httpx.Client) -> None:
    for name in ("live", "ready", "startup"):
        assert client.get(f"/health/{name}").status_code == 200
    summary = client.get("/health").json()
    assert summary["status"] == "ready"
    assert summary["queue"]["limit_audio_s"] > 0


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/startup", "/health/ready"])
def test_uptime_monitors_ask_with_head(client: httpx.Client, path: str) -> None:
    answer = client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_docs_load_nothing_from_other_hosts(client: httpx.Client, server: LiveServer) -> None:
    page = client.get("/docs").text
    addresses = set(re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", page))
    assert addresses == {"/openapi.json"}
    assert "<script" not in page
    hosts = set(re.findall(r"https?://([^/\s<\"]+)", page))
    assert hosts == {server.url.removeprefix("http://")}
    for path in ("/transcribe", "/v1/audio/transcriptions", "/health/ready"):
        assert path in page


def test_docs_are_written_for_callers_not_for_python(client: httpx.Client) -> None:
    page = client.get("/docs").text
    rows = dict(re.findall(r"<tr><td><code>(\w+)</code>(.*)", page.replace("<tr>", "\n<tr>")))
    assert rows["stream"].startswith("<td>boolean<td>false<td>")
    assert rows["format"].endswith("<td>json<td>verbose_json is the same as json here.")
    assert rows["language"].startswith("<td>string<td><td>"), "nothing is sent"
    assert rows["file"].startswith("<td>file<td>required<td>Audio or video")
    first = page.split("<table>")[1]
    assert first.index("<code>file</code>") < first.index("<code>model</code>"), (
        "what is required comes first"
    )
    assert "<td>segment<td>With verbose_json" in page
    assert "``" not in page
    for path in client.get("/").json()["websockets"].values():
        assert f"<code>{path}</code>" in page


def test_openapi_describes_the_fields(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    body = paths["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]["multipart/form-data"][
        "schema"
    ]
    assert set(body["required"]) == {"file", "model"}
    assert {"response_format", "stream", "chunking_strategy", "timestamp_granularities"} <= set(
        body["properties"]
    )
    assert body["properties"]["file"]["format"] == "binary"


@pytest.mark.parametrize("path", ["/transcribe", "/v1/audio/transcriptions"])
def test_openapi_tells_every_form_of_the_answer(client: httpx.Client, path: str) -> None:
    told = client.get("/openapi.json").json()["paths"][path]["post"]["responses"]["200"]["content"]
    form = "format" if path == "/transcribe" else "response_format"
    given = set()
    for choice in ({form: "json"}, {form: "text"}, {form: "srt"}, {form: "vtt"}, {"stream": "true"}):
        response = client.post(path, data={"model": "tiny", **choice}, files={"file": ("a.bin", AUDIO)})
        given.add(response.headers["content-type"].partition(";")[0])
    assert set(told) == given


def test_metrics_count_requests(client: httpx.Client) -> None:
    def ok_count() -> float:
        found = re.search(
            r'asr_requests_total\{model="tiny",outcome="ok",route="/transcribe"\} ([0-9.]+)',
            client.get("/metrics").text,
        )
        return float(found.group(1)) if found else 0.0

    before = ok_count()
    post(client)
    assert ok_count() == before + 1


def test_headers_of_every_answer(client: httpx.Client) -> None:
    for response in (post(client), client.get("/health/live"), client.get("/nothing")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-request-id"]
        assert "server" not in response.headers


def test_stage_times_are_in_the_headers(client: httpx.Client) -> None:
    timing = post(client).headers["server-timing"]
    stages = dict(re.findall(r"(\w+);dur=([0-9.]+)", timing))
    assert list(stages) == ["read", "decode", "segment", "queue", "inference", "ctc", "render"]


def test_request_id_is_the_callers_or_the_traces(client: httpx.Client) -> None:
    given = client.get("/", headers={"x-request-id": "order-66-abcdef"})
    assert given.headers["x-request-id"] == "order-66-abcdef"
    trace = "0af7651916cd43dd8448eb211c80319c"
    traced = client.get("/", headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
    assert traced.headers["x-request-id"] == trace
    unsafe = client.get("/", headers={"x-request-id": "a b<script>"})
    assert "<" not in unsafe.headers["x-request-id"]


def test_cors_is_closed_by_default(client: httpx.Client) -> None:
    response = client.get("/models", headers={"origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
