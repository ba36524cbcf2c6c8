"""The picture of a sound: where its loudness and its tones stand."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from PIL import Image

from tests.late_sound import video
from tests.peak_memory import claiming_a_gigabyte, refusal
from ui.sound import MELS, UnreadableSoundError, blocks, duration_of, media_type, picture_of

RATE_HZ = 16_000


def tone(hz: float, seconds: float, rate_hz: int = RATE_HZ) -> NDArray[np.float32]:
    return np.asarray(
        0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz), np.float32
    )


def file_of(samples: NDArray[np.float32], rate_hz: int = RATE_HZ, kind: str = "WAV") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate_hz, format=kind)
    return out.getvalue()


def m4a_of(samples: NDArray[np.float32]) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=RATE_HZ, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None, :], format="fltp", layout="mono")
        frame.sample_rate = RATE_HZ
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def rows_of(png: bytes) -> NDArray[np.uint8]:
    """Shades (0 dark, 255 bright), (mel from low to high, column)."""
    return np.flipud(np.asarray(Image.open(io.BytesIO(png))))


def test_peaks_follow_the_loudness() -> None:
    samples = np.concatenate([np.zeros(RATE_HZ, np.float32), tone(440, 1.0), 0.5 * tone(440, 1.0)])
    picture = picture_of(file_of(samples))
    peaks = np.frombuffer(picture.peaks, np.uint8)
    second = round(picture.columns_per_s)
    assert picture.duration_s == pytest.approx(3.0)
    assert peaks[: second - 1].max() == 0
    assert peaks[second + 2 : 2 * second - 2].min() > 230
    assert 110 < peaks[2 * second + 2 : -2].mean() < 140


def test_a_tone_stands_at_its_height_and_time() -> None:
    samples = np.concatenate([tone(300, 1.0), tone(3000, 1.0)])
    picture = picture_of(file_of(samples))
    shades = rows_of(picture.tiles[0])
    assert shades.shape[0] == MELS
    half = shades.shape[1] // 2
    low, high = shades[:, : half - 3].mean(axis=1).argmax(), shades[:, half + 3 :].mean(axis=1).argmax()
    mel = (
        2595 * np.log10(1 + np.array([300, 3000]) / 700) / (2595 * np.log10(1 + 8000 / 700)) * (MELS + 1) - 1
    )
    assert abs(low - mel[0]) <= 1.5
    assert abs(high - mel[1]) <= 1.5


def test_nothing_shines_where_nothing_is_heard() -> None:
    shades = rows_of(picture_of(file_of(np.zeros(RATE_HZ, np.float32))).tiles[0])
    assert shades.max() == 0


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_every_format_of_libsndfile_is_drawn(kind: str) -> None:
    data = file_of(tone(440, 1.0), kind=kind)
    assert picture_of(data).duration_s == pytest.approx(1.0, abs=0.1)
    assert duration_of(data) == pytest.approx(1.0, abs=0.1)
    names = {"WAV": "audio/wav", "FLAC": "audio/flac", "OGG": "audio/ogg", "MP3": "audio/mpeg"}
    assert media_type(data) == names[kind]


def test_a_format_only_ffmpeg_reads_is_drawn() -> None:
    data = m4a_of(tone(440, 1.0)[: 15 * 1024])
    assert media_type(data) == "audio/mp4"
    assert picture_of(data).duration_s == pytest.approx(0.96, abs=0.1)
    assert duration_of(data) == pytest.approx(0.96, abs=0.1)


def test_the_sound_of_a_video_is_drawn_where_its_time_stamps_say() -> None:
    picture = picture_of(video("matroska", "aac", (2.0, 4.5)))
    assert picture.duration_s == pytest.approx(5.5, abs=0.05)
    loud = np.flatnonzero(np.frombuffer(picture.peaks, np.uint8) > 100) / picture.columns_per_s
    assert [loud[0], loud[loud > 3.5][0]] == pytest.approx([2.0, 4.5], abs=0.05)
    assert picture_of(video("matroska", "aac", (0.0, 8000.0))).duration_s == pytest.approx(2.0, abs=0.05)


def test_channels_are_mixed_and_odd_values_survive() -> None:
    stereo = np.stack([tone(440, 0.5), -tone(440, 0.5)], axis=1)
    ((mixed, rate_hz),) = blocks(file_of(stereo, 44_100))
    assert rate_hz == 44_100
    assert np.abs(mixed).max() < 1e-3
    odd = io.BytesIO()
    soundfile.write(odd, np.full(RATE_HZ, np.nan, np.float32), RATE_HZ, format="WAV", subtype="FLOAT")
    assert max(picture_of(odd.getvalue()).peaks) == 0


def test_long_sound_stays_within_the_limit_of_columns() -> None:
    rate_hz = 200  # 30 minutes, small
    picture = picture_of(file_of(tone(20, 1800, rate_hz), rate_hz))
    widths = [rows_of(tile).shape[1] for tile in picture.tiles]
    assert sum(widths) == len(picture.peaks) <= 36_000
    assert all(width == picture.columns_per_tile for width in widths[:-1])
    assert sum(widths) / picture.columns_per_s == pytest.approx(1800, rel=0.001)


@pytest.mark.parametrize(
    "data", [b"", b"hello, I am text", b"RIFF\x00\x00\x00\x00WAVE", b"\xff\xfb" + b"\x00" * 99]
)
def test_what_is_no_sound_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableSoundError):
        picture_of(data)
    assert not duration_of(data)


@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile samples/hello.flac\nduration 5\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
        "#EXTM3U\n#EXTINF:10,\nsamples/hello.flac\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_file_never_makes_the_page_open_another(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A concat script read files below the working directory, a session description listened on a port."""
    other = tmp_path / "samples" / "hello.flac"
    other.parent.mkdir()
    other.write_bytes(file_of(tone(440, 1.0), kind="FLAC"))
    monkeypatch.chdir(tmp_path)
    assert duration_of(script.encode()) is None
    with pytest.raises(UnreadableSoundError) as caught:
        list(blocks(script.encode()))
    assert isinstance(caught.value.__cause__, av.error.InvalidDataError | av.error.ArgumentError)


@pytest.mark.parametrize(
    ("call", "error"),
    [("picture_of(data)", "UnreadableSoundError"), ("raise ValueError(duration_of(data))", "ValueError")],
)
def test_counts_in_a_header_cost_no_memory(call: str, error: str) -> None:
    imports, data = "from ui.sound import *", claiming_a_gigabyte(m4a_of(tone(440, 0.5)))
    assert refusal(imports, call, error, data)[1] < 100


@pytest.mark.parametrize("kind", ["FLAC", "MP3"])
@pytest.mark.parametrize("seconds", [8, 30])
def test_of_a_damaged_file_the_part_before_the_damage_is_drawn(kind: str, seconds: int) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, seconds * RATE_HZ).astype(np.float32)
    data = file_of(noise, kind=kind)
    half = len(data) // 2
    damaged = data[:half] + bytes(4000) + data[half + 4000 :]
    # Of an mp3 the part behind it as well: FFmpeg reads it, as in the service.
    readable_s = seconds / 2 if kind == "FLAC" else seconds
    assert picture_of(damaged).duration_s == pytest.approx(readable_s, abs=1.5)
    assert picture_of(data[:half]).duration_s >= seconds / 2 - 1.5


def test_nobody_reads_of_damage_in_an_mp3_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    """libsndfile's decoder would write a line for each frame, of some recordings that are whole as well."""
    data = bytearray(file_of(tone(440, 3.0), kind="MP3"))
    for place in range(2000, len(data), 97):
        data[place] ^= 0xFF
    picture_of(bytes(data))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("at_byte", [100, 5000, 9000])
def test_a_file_damaged_from_its_first_sound_on_is_still_drawn(at_byte: int) -> None:
    """libsndfile gives nothing of it; FFmpeg steps over the damage."""
    data = file_of(np.random.default_rng(0).uniform(-0.5, 0.5, 8 * RATE_HZ).astype(np.float32), kind="FLAC")
    assert picture_of(data[:at_byte] + bytes(4000) + data[at_byte + 4000 :]).duration_s > 7


def test_unknown_bytes_have_no_media_type() -> None:
    assert media_type(b"hello") is None
    assert media_type(b"") is None
    assert media_type(b"\x1aE\xdf\xa3webm") == "audio/webm"
