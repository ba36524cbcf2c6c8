"""Decoding: formats by their bytes, resampling, lying headers, damage, limits. Real decoders throughout."""

from __future__ import annotations

import base64
import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from api import ffmpeg
from api.audio import AudioReader, decode, is_quick
from api.audio_sources import Block, PlainWavSource, open_source
from api.errors import AudioTooLongError, UndecodableAudioError
from api.ffmpeg import limit_ffmpeg_memory
from loadtest import fuzz_seeds
from tests.late_sound import video
from tests.peak_memory import claiming_a_gigabyte, refusal
from tests.tiny_bundle import sing, wav

RATE_HZ = 16_000

# container, codec, and the sample rate it is written at
ENCODED = {
    "mp3": ("mp3", "libmp3lame", 44_100),
    "opus": ("ogg", "libopus", 48_000),
    "m4a": ("ipod", "aac", 44_100),
    "mp4": ("mp4", "aac", 44_100),
    "webm": ("webm", "libopus", 48_000),
}


KINDS = ["wav", "flac", "ogg", *ENCODED]


def encode(kind: str, samples: NDArray[np.float32], *, video: bool = False, audio: bool = True) -> bytes:
    """float32 (samples,) at the format's rate as an encoded file, optionally with a picture track."""
    container_name, codec, rate_hz = ENCODED[kind]
    file = io.BytesIO()
    with av.open(file, "w", format=container_name) as container:
        stream = container.add_stream(codec, rate=rate_hz) if audio else None
        picture = container.add_stream("mpeg4", rate=5) if video else None
        if picture is not None:
            picture.width = picture.height = 64
            picture.pix_fmt = "yuv420p"
        if stream is not None:
            stream.layout = "mono"
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            fuzz_seeds.mux_audio(container, stream, frame, rate_hz)
        if picture is not None:
            for _ in range(5):
                container.mux(picture.encode(av.VideoFrame(64, 64, "yuv420p")))
            container.mux(picture.encode(None))
    return file.getvalue()


def file_of(kind: str, samples: NDArray[np.float32], rate_hz: int) -> bytes:
    if kind == "wav":
        return wav(samples, rate_hz)
    if kind in ("flac", "ogg"):
        file = io.BytesIO()
        soundfile.write(file, samples, rate_hz, format=kind.upper())
        return file.getvalue()
    return encode(kind, samples)


def tone(frequency_hz: float, rate_hz: int, duration_s: float = 1.0) -> NDArray[np.float32]:
    time_s = np.arange(round(duration_s * rate_hz)) / rate_hz
    return (0.5 * np.sin(2 * np.pi * frequency_hz * time_s)).astype(np.float32)


def level(samples: NDArray[np.float32], frequency_hz: float) -> float:
    """Amplitude of one frequency in the middle of the samples."""
    middle = samples[len(samples) // 4 : -len(samples) // 4]
    window = np.hanning(len(middle))
    angle = 2 * np.pi * frequency_hz * np.arange(len(middle)) / RATE_HZ
    return float(2 * abs(np.sum(middle * window * np.exp(-1j * angle))) / window.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_sound(kind: str) -> None:
    rate_hz = ENCODED[kind][2] if kind in ENCODED else 44_100
    original = tone(1000, rate_hz, 2.0)
    decoded = decode(file_of(kind, original, rate_hz), sample_rate_hz=RATE_HZ)
    assert decoded.sample_rate_hz == RATE_HZ
    assert decoded.samples.dtype == np.float32
    assert decoded.samples.ndim == 1
    assert decoded.duration_s == pytest.approx(2.0, abs=0.08)  # lossy codecs pad with a frame
    assert len(decoded.samples) == pytest.approx(decoded.duration_s * RATE_HZ, abs=2)
    assert level(decoded.samples, 1000) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3"])
def test_names_and_types_do_not_matter_only_bytes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "letter.docx"
    path.write_bytes(file_of(kind, tone(440, 44_100), 44_100))
    with path.open("rb") as file:
        assert decode(file, sample_rate_hz=RATE_HZ).duration_s == pytest.approx(1.0, abs=0.08)


def test_resampling_removes_what_would_alias() -> None:
    """A 10 kHz tone cannot exist at 16 kHz; without a filter it would come back at 6 kHz."""
    decoded = decode(wav(tone(10_000, 44_100), 44_100), sample_rate_hz=RATE_HZ)
    assert level(decoded.samples, 6_000) < 1e-4
    assert np.abs(decoded.samples[800:-800]).max() < 1e-3


def test_resampling_keeps_what_fits() -> None:
    decoded = decode(wav(tone(6_000, 44_100), 44_100), sample_rate_hz=RATE_HZ)
    assert level(decoded.samples, 6_000) == pytest.approx(0.5, rel=0.02)


def test_a_file_that_changes_its_rate_is_heard_to_the_end() -> None:
    """As recordings do that a program put together without looking."""
    data = b""
    for rate_hz in (48_000, RATE_HZ, 44_100):
        file = io.BytesIO()
        soundfile.write(file, tone(1000, rate_hz, 2.0), rate_hz, format="MP3")
        data += file.getvalue()
    decoded = decode(data, sample_rate_hz=RATE_HZ)
    assert decoded.duration_s == pytest.approx(6.0, abs=0.4)
    assert len(decoded.samples) == pytest.approx(decoded.duration_s * RATE_HZ, abs=10)
    for third in np.array_split(decoded.samples, 3):
        assert level(third, 1000) == pytest.approx(0.5, rel=0.05)


def test_channels_are_averaged() -> None:
    left, right = tone(500, RATE_HZ), tone(1500, RATE_HZ)
    decoded = decode(wav(np.stack([left, right], axis=1), subtype="FLOAT"), sample_rate_hz=RATE_HZ)
    np.testing.assert_allclose(decoded.samples, (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_integers_become_the_floats_that_libsndfile_makes_of_them(kind: str) -> None:
    every = np.arange(-32_768, 32_768, dtype=np.int16)
    file = io.BytesIO()
    soundfile.write(file, every, RATE_HZ, format=kind, subtype="PCM_16")
    expected = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")[0]
    assert np.array_equal(decode(file.getvalue(), sample_rate_hz=RATE_HZ).samples, expected)


class TestPlainWav:
    """Files that need no decoder; libsndfile says what is in them."""

    @given(
        samples=st.lists(st.integers(-32_768, 32_767), min_size=1, max_size=60),
        channels=st.integers(1, 3),
        rate_hz=st.sampled_from([8_000, 16_000, 44_100]),
    )
    def test_the_samples_are_those_of_libsndfile(
        self, samples: list[int], channels: int, rate_hz: int
    ) -> None:
        file = io.BytesIO()
        soundfile.write(
            file, np.array([samples] * channels, np.int16).T, rate_hz, format="WAV", subtype="PCM_16"
        )
        source = open_source(file)
        assert isinstance(source, PlainWavSource)
        (block,) = source.blocks()
        assert block.sample_rate_hz == rate_hz
        expected = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32", always_2d=True)[0]
        assert np.array_equal(block.samples, expected)

    def test_long_files_come_in_blocks(self) -> None:
        samples = np.arange(-400_000, 400_000, dtype=np.int32).astype(np.int16)
        source = open_source(io.BytesIO(wav(samples.astype(np.float32) / 32_768)))
        blocks = list(source.blocks())
        assert max(block.samples.nbytes for block in blocks) <= 1 << 20
        assert np.array_equal(np.concatenate([block.samples[:, 0] for block in blocks]) * 32_768, samples)

    @pytest.mark.parametrize(
        "change",
        [
            lambda data: data[:-2],  # shorter than the header says
            lambda data: data + b"LIST\4\0\0\0abcd",
            lambda data: data[:4] + b"\0\0\0\0" + data[8:],
            lambda data: data[:20] + b"\6" + data[21:],  # A-law
            lambda data: data[:34] + b"\x18" + data[35:],  # 24 bits
            lambda data: data[:22] + b"\0" + data[23:],  # no channels
            lambda data: data[:22] + b"\x40" + data[23:],
            lambda data: data[:44],
            lambda data: data[:43],
            lambda data: b"RIFX" + data[4:],
        ],
    )
    def test_other_files_go_to_a_decoder_unread(self, change: Callable[[bytes], bytes]) -> None:
        file = io.BytesIO(change(wav(tone(440, RATE_HZ))))
        assert PlainWavSource.of(file) is None
        assert file.tell() == 0

    @pytest.mark.parametrize(
        ("data", "quick"),
        [
            (wav(tone(440, RATE_HZ)), True),
            (wav(tone(440, RATE_HZ, 16.0)), True),
            (wav(tone(440, RATE_HZ, 17.0)), False),
            (wav(tone(440, 8_000), 8_000), False),
            (file_of("flac", tone(440, RATE_HZ), RATE_HZ), False),
            (b"", False),
        ],
    )
    def test_only_what_is_short_and_fits_is_quick(self, data: bytes, quick: bool) -> None:
        file = io.BytesIO(data)
        file.seek(0, io.SEEK_END)
        assert is_quick(file, RATE_HZ) is quick
        assert file.tell() == 0


def test_channels_that_cancel_each_other_are_heard() -> None:
    """One wire of a stereo cable swapped: the mean of the channels is silence."""
    left = tone(500, RATE_HZ)
    for right in (-left, -0.9 * left):
        decoded = decode(wav(np.stack([left, right], axis=1), subtype="FLOAT"), sample_rate_hz=RATE_HZ)
        np.testing.assert_allclose(decoded.samples, left, atol=1e-6)
    for right in (np.zeros_like(left), -0.7 * left):
        decoded = decode(wav(np.stack([left, right], axis=1), subtype="FLOAT"), sample_rate_hz=RATE_HZ)
        np.testing.assert_allclose(decoded.samples, (left + right) / 2, atol=1e-6)


def test_eight_channels_at_192_khz_in_float() -> None:
    samples = np.repeat(tone(1000, 192_000)[:, None], 8, axis=1)
    decoded = decode(wav(samples, 192_000, "FLOAT"), sample_rate_hz=RATE_HZ)
    assert decoded.duration_s == pytest.approx(1.0)
    assert level(decoded.samples, 1000) == pytest.approx(0.5, rel=0.01)


def test_blocks_and_whole_are_the_same_samples() -> None:
    data = wav(sing("abc def gab " * 8, sample_rate_hz=44_100), 44_100)
    whole = decode(data, sample_rate_hz=RATE_HZ).samples
    with AudioReader(io.BytesIO(data), sample_rate_hz=RATE_HZ, max_audio_s=100) as reader:
        blocks = list(reader)
    assert len(blocks) > 1
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_wav_header_that_claims_four_gigabytes_costs_what_is_there() -> None:
    data = bytearray(wav(tone(1000, RATE_HZ)))
    struct.pack_into("<I", data, 4, 0xFFFFFFFF)
    struct.pack_into("<I", data, data.index(b"data") + 4, 0xFFFFFFF0)
    tracemalloc.start()
    decoded = decode(bytes(data), sample_rate_hz=RATE_HZ)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert decoded.duration_s == pytest.approx(1.0)
    assert decoded.warnings == ()  # programs that write to a pipe do this: nothing is missing
    assert peak_bytes < 20_000_000


@pytest.mark.parametrize("riff_bytes", [0, 36, 32_036])
def test_wav_of_a_recorder_that_was_cut_off_is_read(riff_bytes: int) -> None:
    """Such a program writes the lengths last: until then the header says that there is nothing."""
    data = bytearray(wav(tone(1000, RATE_HZ)))
    struct.pack_into("<I", data, 4, riff_bytes)
    struct.pack_into("<I", data, data.index(b"data") + 4, 0)
    decoded = decode(bytes(data), sample_rate_hz=RATE_HZ)
    assert decoded.duration_s == pytest.approx(1.0)
    assert np.array_equal(decoded.samples, decode(wav(tone(1000, RATE_HZ)), sample_rate_hz=RATE_HZ).samples)


def test_decompression_bomb_stops_at_the_cap() -> None:
    """Two hours of silence are a small flac; decoding ends at the limit, whatever the header says."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(16_000 * 600, np.int16), 16_000, format="FLAC")
    data = file.getvalue()
    assert len(data) < 100_000
    with AudioReader(io.BytesIO(data), sample_rate_hz=RATE_HZ, max_audio_s=60) as reader:
        with pytest.raises(AudioTooLongError, match="60 seconds"):
            for _ in reader:
                pass
        assert reader.duration_s < 100


def test_many_channels_at_a_high_rate_stop_at_the_cap_as_well() -> None:
    """An encoder writes them as briefly as one, and they cost as many times the work."""
    dense = np.zeros((int(0.6 * 96_000), 8), np.float32)
    assert decode(file_of("flac", dense, 96_000), sample_rate_hz=RATE_HZ, max_audio_s=2).duration_s == 0.6
    with pytest.raises(AudioTooLongError, match="limit of 384000 samples in all channels"):
        decode(file_of("flac", dense, 96_000), sample_rate_hz=RATE_HZ, max_audio_s=1)


def test_a_flac_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """libsndfile decodes a block again for each seek within it: ten times as long for the largest blocks."""

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("sought")

    data = file_of("flac", tone(1000, 44_100), 44_100)
    monkeypatch.setattr(soundfile.SoundFile, "seek", refuse)
    assert decode(data, sample_rate_hz=RATE_HZ).duration_s == 1.0


@pytest.mark.parametrize(("rate_hz", "duration_s"), [(8_000, 20), (44_100, 12), (48_000, 4)])
def test_a_file_of_the_allowed_length_is_no_longer_than_allowed(rate_hz: int, duration_s: int) -> None:
    """Of these the lengths of the blocks, in seconds, are together a hair more."""
    exact = np.zeros(rate_hz * duration_s, np.float32)
    decoded = decode(file_of("flac", exact, rate_hz), sample_rate_hz=RATE_HZ, max_audio_s=duration_s)
    assert decoded.duration_s == duration_s
    with pytest.raises(AudioTooLongError):
        decode(
            file_of("flac", np.append(exact, exact[:1]), rate_hz),
            sample_rate_hz=RATE_HZ,
            max_audio_s=duration_s,
        )


def test_cap_is_counted_on_samples_not_on_the_header() -> None:
    data = bytearray(wav(tone(1000, RATE_HZ, 3.0)))
    struct.pack_into("<I", data, data.index(b"data") + 4, 1000)  # claims 31 ms; libsndfile believes it
    believed = decode(bytes(data), sample_rate_hz=RATE_HZ, max_audio_s=1.0)
    assert believed.duration_s < 1.0
    assert believed.warnings == ("The file goes on behind the audio that its header tells of.",)
    with pytest.raises(AudioTooLongError):
        decode(wav(tone(1000, RATE_HZ, 3.0)), sample_rate_hz=RATE_HZ, max_audio_s=1.0)


@pytest.mark.parametrize("comment", [b"", b"LIST\x04\x00\x00\x00INFO"])
def test_chunks_behind_the_samples_are_no_cause_to_warn(comment: bytes) -> None:
    data = bytearray(wav(tone(1000, RATE_HZ)) + comment)
    data[36:36] = b"fact\x04\x00\x00\x00\x80\x3e\x00\x00"  # so that it is no plain wav
    struct.pack_into("<I", data, 4, len(data) - 8)
    decoded = decode(bytes(data), sample_rate_hz=RATE_HZ)
    assert decoded.duration_s == pytest.approx(1.0)
    assert decoded.warnings == ()


def empty_wav_with_a_comment() -> bytes:
    """No samples, and behind them a chunk that must not be taken for some."""
    data = bytearray(
        wav(np.zeros(0, np.float32)) + b"LIST" + struct.pack("<I", 4000) + bytes(range(250)) * 16
    )
    struct.pack_into("<I", data, 4, len(data) - 8)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"Dear Sir or Madam,\n" * 200, "undecodable_audio"),
        (b"\x00" * 5000, "undecodable_audio"),
        (b"RIFF\x00\x00\x00\x00WAVE", "undecodable_audio"),
        (wav(np.zeros(0, np.float32)), "no_audio_samples"),
        (empty_wav_with_a_comment(), "no_audio_samples"),
    ],
)
def test_what_is_no_audio_is_refused_with_a_reason(data: bytes, code: str) -> None:
    with pytest.raises(UndecodableAudioError) as caught:
        decode(data, sample_rate_hz=RATE_HZ)
    assert caught.value.code == code


def test_video_without_sound_is_refused_and_video_with_sound_is_read() -> None:
    samples = tone(1000, 44_100)
    with pytest.raises(UndecodableAudioError, match="no audio stream"):
        decode(encode("mp4", samples, video=True, audio=False), sample_rate_hz=RATE_HZ)
    decoded = decode(encode("mp4", samples, video=True), sample_rate_hz=RATE_HZ)
    assert level(decoded.samples, 1000) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("container", ["matroska", "mp4", "mpegts"])
@pytest.mark.parametrize("starts_s", [(0.0, 1.5), (2.0,), (0.0, 5.5), (3.0, 6.0, 9.5)])
def test_the_sound_of_a_video_is_where_its_time_stamps_say(
    container: str, starts_s: tuple[float, ...]
) -> None:
    decoded = decode(video(container, "aac", starts_s), sample_rate_hz=RATE_HZ)
    heard_s = np.flatnonzero(np.abs(decoded.samples) > 0.1) / RATE_HZ
    pauses = np.flatnonzero(np.diff(heard_s) > 0.1)
    assert [heard_s[0], *heard_s[pauses + 1]] == pytest.approx(starts_s, abs=0.025)
    assert decoded.duration_s == pytest.approx(starts_s[-1] + 1, abs=0.05)
    assert not decoded.warnings


def test_a_time_stamp_beyond_the_longest_file_is_not_believed() -> None:
    data = video("matroska", "aac", (0.0, 100.0))
    decoded = decode(data, sample_rate_hz=RATE_HZ, max_audio_s=60)
    assert decoded.duration_s == pytest.approx(2.0, abs=0.05)
    assert decoded.warnings == (
        "The file's time stamps jump beyond 60 seconds; times after it are too early.",
    )
    assert decode(data, sample_rate_hz=RATE_HZ).duration_s == pytest.approx(101.0, abs=0.05)


def stamped(blocks: list[Block], max_audio_s: float) -> AudioReader:
    """Of a source whose blocks bear these times."""
    reader = AudioReader(io.BytesIO(wav(tone(440, RATE_HZ))), sample_rate_hz=RATE_HZ, max_audio_s=max_audio_s)
    reader._source.close()
    reader._source = SimpleNamespace(blocks=lambda: blocks, warnings=[], close=lambda: None)  # type: ignore[assignment]
    return reader


def test_a_rounded_time_stamp_at_the_end_of_the_longest_file_is_no_jump() -> None:
    first = Block(np.zeros((15_840, 1), np.float32), RATE_HZ, 0.0)
    with stamped([first, Block(np.zeros((80, 1), np.float32), RATE_HZ, 1.002)], 1.0) as reader:
        assert sum(map(len, reader)) == 15_920
        assert reader.warnings == ()


@pytest.mark.parametrize(("gap_s", "silence"), [(0.04, 0), (0.1, 1600)])
def test_short_gaps_are_silence_and_shorter_ones_are_rounding(gap_s: float, silence: int) -> None:
    second = np.ones((RATE_HZ, 1), np.float32)
    with stamped([Block(second, RATE_HZ, 0.0), Block(second, RATE_HZ, 1.0 + gap_s)], 60.0) as reader:
        samples = np.concatenate(list(reader))
    assert len(samples) == 2 * RATE_HZ + silence
    assert np.count_nonzero(samples[RATE_HZ : RATE_HZ + silence]) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(value: float) -> None:
    samples = tone(1000, RATE_HZ)
    samples[5000] = value
    with pytest.raises(UndecodableAudioError) as caught:
        decode(wav(samples, subtype="FLOAT"), sample_rate_hz=RATE_HZ)
    assert caught.value.code == "not_finite_samples"


@pytest.mark.parametrize("factor", [1e20, -1e20])
def test_samples_beyond_full_scale_are_clipped(factor: float) -> None:
    samples = factor * np.maximum(tone(1000, RATE_HZ), 0)
    decoded = decode(wav(samples, subtype="FLOAT"), sample_rate_hz=RATE_HZ)
    assert np.abs(decoded.samples).max() == 1.0


def test_resampling_does_not_leave_full_scale() -> None:
    """Mutant 51 of seed 7: full-scale noise at 8 kHz comes out of the filter at twice its height."""
    noise = np.random.default_rng(0).choice([-1.0, 1.0], 8_000).astype(np.float32)
    decoded = decode(wav(noise, 8_000, "FLOAT"), sample_rate_hz=RATE_HZ)
    assert np.abs(decoded.samples).max() == 1.0
    assert len(decoded.samples) == RATE_HZ


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_files_give_what_is_there_or_a_reason(kind: str, share: float) -> None:
    rate_hz = ENCODED[kind][2] if kind in ENCODED else 44_100
    rng = np.random.default_rng(0)
    hiss = rng.normal(0, 0.1, 3 * rate_hz).astype(np.float32)  # fills more than one page of an ogg
    data = file_of(kind, tone(1000, rate_hz, 3.0) + hiss, rate_hz)
    cut = data[: int(len(data) * share)]
    if kind in ("m4a", "mp4"):  # these keep their index at the end
        with pytest.raises(UndecodableAudioError, match="Formats:"):
            decode(cut, sample_rate_hz=RATE_HZ)
        return
    decoded = decode(cut, sample_rate_hz=RATE_HZ)
    assert 0.3 < decoded.duration_s < 3.0
    assert bool(decoded.warnings) == (kind in ("wav", "flac"))


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{path}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXTINF:10,\n{path}\n",
        "ffconcat version 1.0\nfile {path}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
    ],
)
def test_an_upload_never_opens_another_file(playlist: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(wav(tone(1000, RATE_HZ)))
    with pytest.raises(UndecodableAudioError):
        decode(playlist.format(path=secret).encode(), sample_rate_hz=RATE_HZ)


@pytest.mark.parametrize("rate_hz", [1, 999])
def test_absurd_sample_rates_are_refused_before_they_are_resampled(rate_hz: int) -> None:
    data = bytearray(wav(np.zeros(100_000, np.float32) + 0.1))
    struct.pack_into("<I", data, 24, rate_hz)
    with pytest.raises(UndecodableAudioError, match=f"{rate_hz} Hz"):
        decode(bytes(data), sample_rate_hz=RATE_HZ)


@pytest.mark.parametrize(
    ("container", "codec", "channels"),
    [("mov", "pcm_s16le", count) for count in (2, 7, 8, 9, 16, 64)]
    + [("ipod", "aac", 8), ("ogg", "libopus", 8), ("matroska", "flac", 8)],
)
def test_many_channels_do_not_end_the_process(container: str, codec: str, channels: int) -> None:
    """PyAV reads past the end of planar frames with eight or more channels: 7.1 sound ended the service."""
    rate_hz = 48_000
    recipe = fuzz_seeds.Recipe(container, codec, rate_hz, channels)
    decoded = decode(fuzz_seeds.encode(recipe, tone(1000, rate_hz), rate_hz), sample_rate_hz=RATE_HZ)
    assert decoded.duration_s == pytest.approx(1.0, abs=0.03)
    if codec == "pcm_s16le":  # lossy codecs cut the tone out of the subwoofer's channel
        assert level(decoded.samples, 1000) == pytest.approx(0.5 * 0.75, rel=0.01)


def test_damage_that_reads_as_47_channels_is_survived() -> None:
    """Found by the first fuzzing run: sixty-four zeros in an AAC stream."""
    data = bytearray(fuzz_seeds.make_seeds()["aac"])
    data[225:289] = bytes(64)
    assert decode(bytes(data), sample_rate_hz=RATE_HZ).duration_s > 0.5


LATE_STREAM = (
    "c-muN7_z|KfkB9YVFND%<3S*g@dJa_MwU%O#q9w=w=-=J0=xYo!v_X_5V39cfty3X?T!p4>~J0<lFa{)3=ER{2esQ78BBWye"
    "F!(>3U@P5xa%N=J1aEY0~{pmfkOIgwsOl&I-*#7Y}uc`Nz49hUwdlF^2@XB8Oj+LzLj!&l=dAvF9|l{#8un!RZEgiXsY_mOj"
    "^A!_+~M~N(SGlvJ5{NZfkb7zSnjVbJv_0bmg#q)`h+N3=CxqVL1#|=NRIuJ~1#<^L_q!ch}RVoUCknk4gr4po!lZDy<%^;C5"
    "l~VyI=%XL!CYufUKYfZ^@we~!EiIxWC(H=i+BgWK-#ZfAS8V|=fUA9!!XApfH58^i3)40l9RCq8UG3J!M*l=Oasp@9{i-lZ4"
    "@d3v|(9BKvoOsLyE8LY6EGoyfF005fYYi0"
)


def test_streams_that_appear_while_reading_are_no_error_of_ours() -> None:
    """PyAV's flush raises IndexError for a second stream found late; cut down from a mutant of MPEG-TS."""
    decoded = decode(zlib.decompress(base64.b85decode(LATE_STREAM)), sample_rate_hz=RATE_HZ)
    assert decoded.container == "mpegts"
    assert decoded.duration_s > 0
    assert decoded.warnings


def test_counts_in_a_header_cost_no_memory() -> None:
    """Mutant 6955 of seed 1."""
    imports = "from api.audio import decode; from api.errors import UndecodableAudioError"
    data = claiming_a_gigabyte(fuzz_seeds.make_seeds()["m4a"])
    code, grown_mb = refusal(imports, "decode(data, sample_rate_hz=16000)", "UndecodableAudioError", data)
    assert code == "no_audio_samples"
    assert grown_mb < 100


def many_tracks(count: int) -> bytes:
    """Matroska with `count` audio tracks of a second each, as recordings of meetings and films have."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="matroska") as out:
        streams = [out.add_stream("libopus", rate=48_000, layout="mono") for _ in range(count)]
        samples = tone(440, 48_000, 1.0)
        for at in range(0, len(samples), 960):
            frame = av.AudioFrame.from_ndarray(samples[None, at : at + 960], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48_000, at
            for stream in streams:
                out.mux(stream.encode(frame))
        for stream in streams:
            out.mux(stream.encode(None))
    return sink.getvalue()


def test_the_first_of_many_tracks_is_whole() -> None:
    decoded = decode(many_tracks(20), sample_rate_hz=RATE_HZ)
    assert decoded.duration_s == pytest.approx(1.0, abs=0.02)
    assert not decoded.warnings


def test_more_tracks_than_ffmpeg_reads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffmpeg, "_MAX_STREAMS", 5)
    with pytest.raises(UndecodableAudioError, match=r"5 streams or more; fewer than 5"):
        decode(many_tracks(6), sample_rate_hz=RATE_HZ)


def test_ffmpeg_is_found_in_this_process() -> None:
    assert limit_ffmpeg_memory() == 1


def test_flac_damaged_at_its_beginning_gives_what_is_behind() -> None:
    """libFLAC gives up the read that meets damage; FFmpeg goes on with the next frame."""
    data = bytearray(file_of("flac", tone(1000, 44_100, 3.0), 44_100))
    data[1_000:1_004] = bytes(4)
    decoded = decode(bytes(data), sample_rate_hz=RATE_HZ)
    assert decoded.duration_s > 2.0
    assert len(decoded.warnings) == 1


SEEDS = {kind: file_of(kind, tone(1000, ENCODED[kind][2] if kind in ENCODED else 44_100, 0.3), 44_100)
         for kind in KINDS}  # fmt: skip


@given(
    kind=st.sampled_from(sorted(SEEDS)),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=12),
    keep=st.floats(0.05, 1.0),
)
def test_mutated_files_are_audio_or_undecodable_nothing_else(
    kind: str, edits: list[tuple[float, int]], keep: float
) -> None:
    data = bytearray(SEEDS[kind])
    for place, value in edits:
        data[min(int(place**2 * len(data)), len(data) - 1)] = value
    try:
        decoded = decode(bytes(data[: max(1, int(keep * len(data)))]), sample_rate_hz=RATE_HZ, max_audio_s=60)
    except (UndecodableAudioError, AudioTooLongError):
        return
    assert np.isfinite(decoded.samples).all()


def test_ffmpeg_is_loaded_by_the_first_file_that_needs_it(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(tone(440, RATE_HZ)))
    (tmp_path / "a.ogg").write_bytes(file_of("ogg", tone(440, RATE_HZ), RATE_HZ))
    program = """
import sys
from api.audio import decode
import api.main
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        decode(file, sample_rate_hz=16000)
    print("av" in sys.modules)
"""
    command = [sys.executable, "-c", program, tmp_path / "a.wav", tmp_path / "a.ogg"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]
