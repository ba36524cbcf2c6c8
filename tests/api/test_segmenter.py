"""Cutting: nothing lost, nothing twice, at silence; the same whatever the blocks; silence gives no window."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from api.segmenter import Segmenter, Window, may_be_speech, quietest_cut
from api.vad import VadOptions
from tests.tiny_bundle import sing

RATE_HZ = 16_000


def cut(
    samples: NDArray[np.float32], *, block: int = 7_001, window_s: float = 4.0, vad: VadOptions | None = None
) -> list[Window]:
    segmenter = Segmenter(sample_rate_hz=RATE_HZ, max_window_s=window_s, vad=vad)
    windows = []
    for start in range(0, len(samples), block):
        windows += list(segmenter.push(samples[start : start + block]))
    return [*windows, *segmenter.finish()]


def noise(duration_s: float, level: float, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return rng.normal(0.0, level, round(duration_s * RATE_HZ)).astype(np.float32)


def bursts(gaps_s: list[float], burst_s: float = 0.7) -> NDArray[np.float32]:
    """Loud noise bursts (words) with quiet gaps between them, and one burst at the end."""
    parts = []
    for index, gap_s in enumerate(gaps_s):
        parts += [noise(burst_s, 0.2, index), noise(gap_s, 0.001, 100 + index)]
    parts.append(noise(burst_s, 0.2, 99))
    return np.concatenate(parts)


def test_short_audio_stays_whole() -> None:
    samples = sing("abc de")
    windows = cut(samples)
    assert len(windows) == 1
    assert windows[0].start_sample == 0
    np.testing.assert_array_equal(windows[0].samples, samples)


@settings(max_examples=30)
@given(st.lists(st.floats(0.3, 1.5), min_size=6, max_size=20), st.integers(500, 40_000))
def test_long_audio_is_cut_without_loss_or_overlap(gaps_s: list[float], block: int) -> None:
    samples = bursts(gaps_s)
    windows = cut(samples, block=block)
    assert all(len(window.samples) <= 4 * RATE_HZ for window in windows)
    np.testing.assert_array_equal(np.concatenate([window.samples for window in windows]), samples)
    starts = np.cumsum([0, *(len(window.samples) for window in windows)])[:-1]
    assert [window.start_sample for window in windows] == starts.tolist()


@settings(max_examples=30)
@given(st.lists(st.floats(0.3, 1.5), min_size=6, max_size=12))
def test_cuts_fall_into_the_gaps(gaps_s: list[float]) -> None:
    samples = bursts(gaps_s)
    edges = np.cumsum([length for gap_s in gaps_s for length in (0.7, gap_s)])
    for window in cut(samples)[1:]:
        at_s = window.start_sample / RATE_HZ
        piece = int(np.searchsorted(edges, at_s))
        assert piece % 2 == 1, f"the cut at {at_s:.2f} s is inside a burst"


@settings(max_examples=30)
@given(st.integers(100, 50_000), st.booleans())
def test_windows_do_not_depend_on_the_blocks(block: int, with_vad: bool) -> None:
    vad = VadOptions(silence_duration_ms=200) if with_vad else None
    samples = bursts([0.4, 0.9, 0.3, 1.2, 0.5, 0.7, 0.4, 1.0])
    reference, other = cut(samples, vad=vad), cut(samples, block=block, vad=vad)
    assert [window.start_sample for window in other] == [window.start_sample for window in reference]
    for left, right in zip(reference, other, strict=True):
        np.testing.assert_array_equal(left.samples, right.samples)


def test_continuous_speech_is_cut_where_it_is_quietest() -> None:
    samples = noise(6.0, 0.2)
    samples[3 * RATE_HZ : 3 * RATE_HZ + 4000] *= 0.05
    assert 3 * RATE_HZ <= quietest_cut(samples[: 4 * RATE_HZ], RATE_HZ) <= 3 * RATE_HZ + 4000


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(RATE_HZ * 3, np.float32),
        noise(3.0, 1e-4),
        noise(3.0, 0.3),
        (0.5 * np.sin(np.arange(3 * RATE_HZ) * 0.3)).astype(np.float32),
        np.zeros(10, np.float32),
    ],
    ids=["digital silence", "faint noise", "loud steady noise", "tone", "ten samples"],
)
def test_what_cannot_be_speech_gives_no_window(samples: NDArray[np.float32]) -> None:
    assert cut(samples) == []


def test_a_short_steady_vowel_is_kept() -> None:
    assert may_be_speech((0.3 * np.sin(np.arange(0.4 * RATE_HZ) * 0.1)).astype(np.float32), RATE_HZ)


def test_a_quiet_word_in_long_silence_is_kept() -> None:
    samples = noise(3.5, 0.0003)
    samples[20_000:24_000] += 0.01 * noise(0.25, 1.0, 5)
    assert may_be_speech(samples, RATE_HZ)


@pytest.mark.parametrize("vad", [None, VadOptions()], ids=["whole", "server_vad"])
def test_a_constant_offset_hides_no_speech(vad: VadOptions | None) -> None:
    samples = 0.05 * np.concatenate([noise(1.0, 0.001, 9), bursts([1.0, 1.5, 0.8, 1.2])])
    offset = samples + np.float32(0.1)
    assert [window.start_sample for window in cut(samples, vad=vad)] == [
        window.start_sample for window in cut(offset, vad=vad)
    ]
    assert cut(np.full(3 * RATE_HZ, 0.1, np.float32), vad=vad) == []


def test_silent_windows_of_a_long_file_are_dropped_and_times_kept() -> None:
    samples = np.concatenate([sing("abc"), np.zeros(20 * RATE_HZ, np.float32), sing("de")])
    windows = cut(samples)
    assert 1 <= len(windows) <= 3
    last = windows[-1]
    assert last.start_sample + len(last.samples) == len(samples)


class TestVoicesOfDifferentLoudness:
    """For models that scale a window as a whole."""

    def windows(self, samples: NDArray[np.float32], *, block: int = 7_001) -> list[Window]:
        segmenter = Segmenter(sample_rate_hz=RATE_HZ, max_window_s=30.0, scales_windows=True)
        windows = []
        for start in range(0, len(samples), block):
            windows += list(segmenter.push(samples[start : start + block]))
        return [*windows, *segmenter.finish()]

    def turns(self, *levels_db: float, gap_s: float = 0.5) -> NDArray[np.float32]:
        """Two bursts each."""
        parts = [noise(0.3, 0.001, 50)]
        for index, level_db in enumerate(levels_db):
            scale = np.float32(10 ** (level_db / 20))
            for place in range(2):
                parts += [scale * noise(0.8, 0.2, 2 * index + place), noise(gap_s, 0.001, 60 + index)]
        return np.concatenate(parts)

    def test_each_has_windows_of_its_own_and_nothing_is_lost(self) -> None:
        samples = self.turns(0, -16, -14, -1)
        windows = self.windows(samples)
        np.testing.assert_array_equal(np.concatenate([window.samples for window in windows]), samples)
        starts_s = [window.start_sample / RATE_HZ for window in windows]
        turn_s = 2 * (0.8 + 0.5)
        assert starts_s == pytest.approx([0.0, 0.3 + turn_s - 0.25, 0.3 + 3 * turn_s - 0.25], abs=0.05)
        other = self.windows(samples, block=900)
        assert [window.start_sample for window in other] == [window.start_sample for window in windows]

    @pytest.mark.parametrize(
        ("levels_db", "gap_s"),
        [((0, -7, 0, -8), 0.5), ((0, -16, 0), 0.15), ((-16, -22, -12), 0.5)],
        ids=["nearly as loud", "without a pause", "all quiet"],
    )
    def test_what_belongs_together_stays_together(self, levels_db: tuple[float, ...], gap_s: float) -> None:
        assert len(self.windows(self.turns(*levels_db, gap_s=gap_s))) == 1

    def test_a_click_is_no_voice(self) -> None:
        samples = np.concatenate([noise(0.1, 0.2, 70), noise(0.5, 0.001, 71), self.turns(-16, -16)])
        assert len(self.windows(samples)) == 1

    @pytest.mark.parametrize("level", [0.0, 1e-4, 0.1])
    def test_no_speech_gives_no_window(self, level: float) -> None:
        assert self.windows(noise(5.0, level)) == []

    def test_other_models_hear_all_of_it_at_once(self) -> None:
        assert len(cut(self.turns(0, -16, 0), window_s=30.0)) == 1


class TestServerVad:
    """The three parameters of ``server_vad`` change what they name."""

    def test_each_stretch_of_speech_is_one_window(self) -> None:
        samples = np.concatenate([noise(1.0, 0.001, 9), bursts([1.0, 1.0, 1.0])])
        windows = cut(samples, vad=VadOptions())
        assert len(windows) == 4
        for index, window in enumerate(windows):
            speech_starts_s = 1.0 + index * 1.7
            assert window.start_sample / RATE_HZ == pytest.approx(speech_starts_s - 0.3, abs=0.05)

    def test_silence_duration_decides_what_is_one_stretch(self) -> None:
        samples = np.concatenate([noise(1.0, 0.001, 9), bursts([0.4, 0.4], 0.5)])
        assert len(cut(samples, vad=VadOptions(silence_duration_ms=200))) == 3
        assert len(cut(samples, vad=VadOptions(silence_duration_ms=800))) == 1

    def test_prefix_padding_is_kept_before_speech(self) -> None:
        samples = np.concatenate([noise(2.0, 0.001, 9), bursts([1.0])])
        short = cut(samples, vad=VadOptions(prefix_padding_ms=0))[0].start_sample
        long = cut(samples, vad=VadOptions(prefix_padding_ms=1000))[0].start_sample
        assert short - long == RATE_HZ

    def test_the_end_of_a_short_pause_is_kept_before_the_next_speech(self) -> None:
        """Most of the padding had come before the pause was long enough."""
        samples = np.concatenate([noise(1.0, 0.001, 9), bursts([0.6])])
        vad = VadOptions(prefix_padding_ms=300, silence_duration_ms=500)
        _, second = cut(samples, vad=vad)
        assert second.start_sample / RATE_HZ == pytest.approx(1.0 + 0.7 + 0.6 - 0.3, abs=0.05)

    def test_threshold_decides_what_is_speech(self) -> None:
        floor = noise(8.0, 0.01, 9)
        floor[3 * RATE_HZ : 4 * RATE_HZ] *= 4.5  # 13 dB over the floor: p = 0.82
        assert len(cut(floor, window_s=9, vad=VadOptions(threshold=0.5))) == 1
        assert cut(floor, window_s=9, vad=VadOptions(threshold=0.97)) == []

    def test_packets_that_a_telephone_lost_do_not_hide_the_noise(self) -> None:
        samples = np.concatenate([noise(1.0, 0.001, 9), bursts([1.0] * 4)]) + noise(8.5, 0.005, 8)
        lost = np.random.default_rng(1).random(len(samples) // 320) < 0.02
        samples[: len(lost) * 320].reshape(-1, 320)[lost] = 0.0
        assert len(cut(samples, vad=VadOptions())) == 5

    def test_quiet_syllables_in_noise_belong_to_their_word(self) -> None:
        word = np.concatenate([noise(0.2, level, index) for index, level in enumerate([0.1, 0.02] * 6)])
        parts = [noise(1.0, 0.001, 20), word, noise(1.0, 0.001, 21), word, noise(1.0, 0.001, 22)]
        samples = np.concatenate(parts) + noise(3.0 + 2 * len(word) / RATE_HZ, 0.01, 23)
        windows = cut(samples, vad=VadOptions(silence_duration_ms=200, prefix_padding_ms=0))
        assert [len(window.samples) / RATE_HZ for window in windows] == pytest.approx([2.4, 2.4], abs=0.3)

    def test_quiet_speech_is_heard(self) -> None:
        samples = 0.004 * np.concatenate([noise(1.0, 0.01, 9), bursts([1.0, 1.0])])  # speech at -62 dBFS
        assert len(cut(samples, vad=VadOptions())) == 3

    def test_louder_noise_is_noise_after_a_while(self) -> None:
        samples = np.concatenate([noise(2.0, 0.001, 9), noise(20.0, 0.02, 8)])
        windows = cut(samples, window_s=30, vad=VadOptions())
        assert sum(len(window.samples) for window in windows) < 12 * RATE_HZ

    @pytest.mark.parametrize(("duration_s", "windows"), [(0.02, 0), (0.05, 1)])
    def test_a_click_is_no_speech(self, duration_s: float, windows: int) -> None:
        samples = np.concatenate([noise(1.0, 0.001), noise(duration_s, 0.2), noise(1.0, 0.001)])
        assert len(cut(samples, vad=VadOptions())) == windows

    def test_speech_from_the_first_sample_is_heard(self) -> None:
        windows = cut(bursts([1.0]), vad=VadOptions())
        assert windows[0].start_sample == 0

    def test_what_is_kept_at_the_end_of_the_file_is_one_piece_of_it(self) -> None:
        """The pause at the end is longer than what is kept of it, and ends in the middle of a frame."""
        samples = np.concatenate([noise(1.0, 0.001, 9), bursts([]), noise(0.3, 0.001, 8), np.ones(50, "f4")])
        (window,) = cut(samples, vad=VadOptions())
        end_sample = window.start_sample + len(window.samples)
        np.testing.assert_array_equal(window.samples, samples[window.start_sample : end_sample])

    def test_stretches_longer_than_the_window_are_cut(self) -> None:
        samples = bursts([0.35] * 12)
        windows = cut(samples, vad=VadOptions())
        assert len(windows) >= 3
        np.testing.assert_array_equal(np.concatenate([window.samples for window in windows]), samples)
