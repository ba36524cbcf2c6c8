"""What a live session is made of, without a connection: samples, utterances, told words, its fields."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import soxr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from api.errors import ClientError, InvalidRequestError, InvalidValueError
from api.live.pcm import PcmInput, check_rate
from api.live.realtime_session import Session, updated
from api.live.recogniser import AGREE_S, AGREE_SHARE, Recogniser, StableWords
from api.live.utterances import Began, Ended, Happening, Piece, Utterances
from api.live.vosk import Pace
from api.segmenter import Window
from api.telemetry import Telemetry
from api.transcriber import Options, Transcriber
from api.vad import VadOptions

RATE_HZ = 16_000
FloatArray = NDArray[np.float32]


def noise(seconds: float, level: float = 0.1, seed: int = 1) -> FloatArray:
    chance = np.random.default_rng(seed)
    return (level * chance.standard_normal(round(seconds * RATE_HZ))).astype(np.float32)


def pcm16(samples: FloatArray) -> bytes:
    return (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


# -- pcm


@given(cuts=st.lists(st.integers(0, 400), max_size=6), seed=st.integers(0, 5))
def test_pieces_may_end_anywhere_also_within_a_sample(cuts: list[int], seed: int) -> None:
    data = pcm16(noise(0.0125, seed=seed))
    whole = PcmInput("audio/pcm", RATE_HZ, RATE_HZ).feed(data)
    stream = PcmInput("audio/pcm", RATE_HZ, RATE_HZ)
    bounds = [0, *sorted(cuts), len(data)]
    pieces = [stream.feed(data[a:b]) for a, b in pairwise(bounds)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert len(whole) == len(data) // 2


def test_resampling_in_pieces_is_resampling_at_once() -> None:
    sound = np.sin(2 * np.pi * 440 * np.arange(24_000) / 24_000).astype(np.float32) * 0.5
    stream = PcmInput("audio/pcm", 24_000, RATE_HZ)
    data = pcm16(sound)
    heard = np.concatenate(
        [*(stream.feed(data[at : at + 777]) for at in range(0, len(data), 777)), stream.flush()]
    )
    expected = soxr.resample((sound * 32767).astype("<i2").astype(np.float32) / 32768, 24_000, RATE_HZ, "HQ")
    assert abs(len(heard) - RATE_HZ) <= 1
    assert np.abs(heard[: len(expected)] - expected[: len(heard)]).max() < 1e-4


@pytest.mark.parametrize("rate_hz", [RATE_HZ, 24_000])
def test_half_a_sample_waits_for_its_other_half_over_a_flush_and_a_change(rate_hz: int) -> None:
    data = pcm16(noise(0.25))
    stream = PcmInput("audio/pcm", rate_hz, RATE_HZ)
    first = [stream.feed(data[:4001]), stream.flush()]
    second = [stream.feed(data[4001:6001]), stream.flush()]
    other = PcmInput("audio/pcm", rate_hz, RATE_HZ, stream)
    third = [other.feed(data[6001:]), other.flush()]
    for heard, part in ((first, data[:4000]), (second, data[4000:6000]), (third, data[6000:])):
        alone = PcmInput("audio/pcm", rate_hz, RATE_HZ)
        np.testing.assert_array_equal(np.concatenate(heard), [*alone.feed(part), *alone.flush()])


def test_half_a_sample_is_forgotten_with_the_rest_and_no_part_of_another_encoding() -> None:
    data = pcm16(noise(0.0125))
    stream = PcmInput("audio/pcm", RATE_HZ, RATE_HZ)
    stream.feed(b"x")
    in_mu_law = PcmInput("audio/pcmu", RATE_HZ, RATE_HZ, stream)
    assert len(in_mu_law.feed(b"")) == 0
    back = PcmInput("audio/pcm", RATE_HZ, RATE_HZ, in_mu_law)
    stream.clear()
    for each in (stream, back):
        np.testing.assert_array_equal(each.feed(data), PcmInput("audio/pcm", RATE_HZ, RATE_HZ).feed(data))


def g711_by_the_book(code: int, law: str) -> int:
    """One byte of G.711 to a 16-bit sample, bit by bit."""
    if law == "audio/pcmu":
        code = ~code & 0xFF
        value = ((((code & 0x0F) << 3) + 0x84) << ((code & 0x70) >> 4)) - 0x84
        return -value if code & 0x80 else value
    code ^= 0x55
    value, segment = (code & 0x0F) << 4, (code & 0x70) >> 4
    value = value + 8 if segment == 0 else (value + 0x108) << (segment - 1)
    return value if code & 0x80 else -value


@pytest.mark.parametrize("law", ["audio/pcmu", "audio/pcma"])
def test_g711_by_the_book(law: str) -> None:
    heard = PcmInput(law, 8000, 8000).feed(bytes(range(256)))  # type: ignore[arg-type]
    assert (heard * 32768).tolist() == [g711_by_the_book(code, law) for code in range(256)]
    assert np.abs(heard).max() > 0.97


@pytest.mark.parametrize("rate", [16000, 16000.0, "16000", "16000.0", "1.6e4"])
def test_a_sample_rate_is_a_number_or_its_text(rate: object) -> None:
    assert check_rate(rate, "sample_rate") == 16_000


@pytest.mark.parametrize(
    "rate",
    [
        7999,
        48001,
        16000.5,
        math.nan,
        math.inf,
        10**400,
        "7999",
        "nan",
        "16k",
        "",
        "\ud800",
        True,
        None,
        [16000],
    ],
)
def test_a_sample_rate_out_of_range_is_refused_by_name(rate: object) -> None:
    with pytest.raises(InvalidValueError, match="from 8000 to 48000 Hz") as caught:
        check_rate(rate, "sample_rate")
    assert caught.value.param == "sample_rate"


# -- utterances


def utterances(vad: VadOptions | None, after: Utterances | None = None) -> Utterances:
    return Utterances(sample_rate_hz=RATE_HZ, max_window_s=4.0, vad=vad, after=after)


def spoken(happenings: list[Happening]) -> list[tuple[int, int]]:
    """(start, end) of each utterance, after checking that all comes in order and nothing twice."""
    found, begun, after = [], None, 0
    for happening in happenings:
        if isinstance(happening, Began):
            assert begun is None
            begun = after = happening.at_sample
        elif isinstance(happening, Piece):
            assert begun is not None
            assert happening.window.start_sample == after
            after += len(happening.window.samples)
        else:
            assert isinstance(happening, Ended)
            assert begun is not None
            assert happening.at_sample == after
            found.append((begun, after))
            begun = None
    return found


@given(blocks=st.lists(st.integers(1, 30_000), min_size=1, max_size=12))
def test_utterances_do_not_depend_on_how_the_sound_came(blocks: list[int]) -> None:
    sound = np.concatenate(
        [np.zeros(RATE_HZ, np.float32), noise(1.5), np.zeros(RATE_HZ, np.float32), noise(6.0)]
    )
    for vad in (VadOptions(), None):
        at_once, in_blocks = utterances(vad), utterances(vad)
        expected = spoken([*at_once.push(sound), *at_once.commit()])
        happened: list[Happening] = []
        at = 0
        for length in [*blocks, len(sound)]:
            happened += in_blocks.push(sound[at : at + length])
            at += length
        assert spoken([*happened, *in_blocks.commit()]) == expected
        assert expected == [(0, len(sound))] if vad is None else len(expected) == 2


def test_a_pause_ends_an_utterance_and_its_padding_is_kept() -> None:
    ears = utterances(VadOptions(prefix_padding_ms=300, silence_duration_ms=500))
    quiet = np.zeros(RATE_HZ, np.float32)
    found = spoken(list(ears.push(np.concatenate([quiet, noise(1.0), quiet, quiet]))))
    ((start, end),) = found
    assert start / RATE_HZ == pytest.approx(0.7, abs=0.03)
    assert 2.0 <= end / RATE_HZ <= 2.5
    assert not ears.is_open


def test_commit_ends_what_is_open_and_only_that() -> None:
    ears = utterances(VadOptions())
    quiet = np.zeros(RATE_HZ, np.float32)
    happened = list(ears.push(np.concatenate([quiet, noise(1.0)])))
    assert ears.is_open
    assert len(spoken([*happened, *ears.commit()])) == 1
    assert not ears.is_open
    assert list(ears.commit()) == []
    # What comes later is counted from the start of the recording.
    ((start, _),) = spoken([*ears.push(np.concatenate([quiet, noise(1.0, seed=2)])), *ears.commit()])
    assert start / RATE_HZ == pytest.approx(2.7, abs=0.03)


def test_clear_forgets() -> None:
    ears = utterances(None)
    list(ears.push(noise(1.0)))
    assert ears.so_far() is not None
    ears.clear()
    assert (ears.so_far(), ears.is_open, list(ears.commit())) == (None, False, [])
    assert spoken([*ears.push(noise(0.5)), *ears.commit()]) == [(RATE_HZ, RATE_HZ + RATE_HZ // 2)]


@pytest.mark.parametrize("rate_hz", [8000, 24_000, 44_100])
def test_times_after_many_clears_are_those_of_the_recording(rate_hz: int) -> None:
    pcm, ears = PcmInput("audio/pcm", rate_hz, RATE_HZ), utterances(None)
    tenth = pcm16(noise(rate_hz / RATE_HZ / 10))
    for _ in range(100):
        list(ears.push(pcm.feed(tenth)))
        ears.clear(len(pcm.clear()))
    assert ears.samples_heard / RATE_HZ == pytest.approx(10.0, abs=0.01)


def test_the_noise_is_known_after_clear() -> None:
    ears = utterances(VadOptions())
    list(ears.push(noise(15.0, 0.03)))  # loud enough to pass for speech at first
    assert not ears.is_open
    ears.clear()
    list(ears.push(noise(1.0, 0.03, seed=2)))
    assert not ears.is_open


@pytest.mark.parametrize("between", [False, True])
def test_the_noise_is_known_to_who_listens_next(between: bool) -> None:
    ears = utterances(VadOptions())
    list(ears.push(noise(15.0, 0.03)))
    heard = ears.samples_heard
    if between:
        ears = utterances(None, after=ears)
    other = utterances(VadOptions(silence_duration_ms=300), after=ears)
    assert other.samples_heard == heard
    list(other.push(noise(1.0, 0.03, seed=2)))
    assert not other.is_open


def test_no_more_than_a_window_is_held() -> None:
    ears = utterances(None)
    pieces = [each for each in ears.push(noise(20.0)) if isinstance(each, Piece)]
    assert all(len(piece.window.samples) <= 4 * RATE_HZ for piece in pieces)
    so_far = ears.so_far()
    assert so_far is not None
    assert sum(len(piece.window.samples) for piece in pieces) + len(so_far.samples) == 20 * RATE_HZ
    assert ears.open_samples == len(so_far.samples) <= 4 * RATE_HZ


# -- told words

WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=5).map(" ".join)


@given(looks=st.lists(st.tuples(st.integers(1, 20), WORDS), max_size=8), last=WORDS)
def test_what_was_told_only_grows_and_was_agreed_on_for_long_enough(
    looks: list[tuple[int, str]], last: str
) -> None:
    words, told = StableWords(), ""
    seen: list[tuple[float, list[str]]] = []
    heard_s = 0.0
    for tenths, text in looks:
        heard_s += tenths / 10
        delta = words.look(text, heard_s)
        told += delta
        seen.append((heard_s, text.split()))
        if delta:
            count = len(told.split())
            since_s = heard_s - max(AGREE_S, AGREE_SHARE * heard_s) + 1e-3
            first = max(index for index, (at_s, _) in enumerate(seen) if at_s <= since_s)
            assert first < len(seen) - 1
            assert all(before[:count] == told.split() for _, before in seen[first:])
    begins_alike = last.split()[: len(told.split())] == told.split()
    rest = words.finish(last)
    assert told + rest == last if begins_alike else rest == ""


def test_after_a_piece_words_must_be_agreed_on_anew() -> None:
    words = StableWords()
    assert [words.look("he has", heard_s) for heard_s in (8.0, 10.0, 0.2, 0.4)] == ["", "he has", "", ""]
    assert [words.look("he has been", heard_s) for heard_s in (0.6, 0.8, 1.0)] == ["", "", " been"]


def test_a_word_is_told_once_looks_agree_on_it_for_long_enough() -> None:
    words = StableWords()
    looks = ("he", "he has", "he has", "he has been", "he has been", "he is")
    told = [words.look(text, 0.2 * (number + 1)) for number, text in enumerate(looks)]
    assert told == ["", "", "he", " has", "", ""]
    assert words.finish("he has been there") == " been there"
    assert words.finish("she") == ""


class TestLooks:
    """When another look at what was said so far is worth it."""

    def test_only_while_nobody_waits(self) -> None:
        model = SimpleNamespace(batcher=SimpleNamespace(is_quiet=True))
        recogniser = recogniser_of(model)
        assert [recogniser.wants_look(heard_s) for heard_s in (0.0, 5.0)] == [False, True]
        model.batcher.is_quiet = False
        assert not recogniser.wants_look(5.0)

    async def test_after_a_piece_they_begin_anew(self) -> None:
        model = SimpleNamespace(batcher=SimpleNamespace(is_quiet=True))
        recogniser = recogniser_of(model)
        await recogniser.look(Window(0, np.zeros(20 * RATE_HZ, np.float32)))
        assert not recogniser.wants_look(0.5)
        await recogniser.add(Window(0, np.zeros(22 * RATE_HZ, np.float32)))
        assert recogniser.wants_look(0.5)


class TestPace:
    """When a Vosk session looks."""

    @pytest.mark.parametrize("piece_s", [0.1, 3.0])
    def test_who_speaks_sees_every_look_however_long_they_take(self, piece_s: float) -> None:
        pace, chance = Pace(), np.random.default_rng(1)
        for number in range(600):
            arrives_s = 50.0 + number * piece_s + chance.uniform(0, 0.4)  # so much late
            pace.heard(piece_s, arrives_s)
            assert pace.may_look(arrives_s)
            pace.looked(arrives_s, arrives_s + 0.9 * piece_s)

    def test_who_is_ahead_sees_one_after_as_long_as_the_last_took(self) -> None:
        pace = Pace()
        for _ in range(20):
            pace.heard(0.1, 50.0)
        assert pace.may_look(50.0)
        pace.looked(50.0, 50.01)
        assert [pace.may_look(at_s) for at_s in (50.1, 50.22)] == [False, True]
        pace.looked(50.3, 51.0)
        assert [pace.may_look(at_s) for at_s in (51.6, 51.8)] == [False, True]

    def test_who_waits_for_the_time_he_was_ahead_speaks_again(self) -> None:
        pace = Pace()
        pace.heard(5.0, 50.0)
        pace.heard(0.1, 50.0)
        pace.looked(50.0, 54.0)
        assert not pace.may_look(54.1)
        pace.heard(0.1, 54.1)
        assert pace.may_look(54.1)

    def test_a_silence_is_no_credit(self) -> None:
        pace = Pace()
        pace.heard(0.1, 50.0)
        for _ in range(2):
            pace.heard(2.0, 500.0)
        pace.looked(500.0, 500.1)
        assert not pace.may_look(500.1)


def recogniser_of(model: SimpleNamespace) -> Recogniser:
    """Of a model that is asked nothing, as what it is given is silent."""
    model.bundle = SimpleNamespace(manifest=SimpleNamespace(sample_rate_hz=RATE_HZ))
    transcriber = cast(Transcriber, SimpleNamespace(model=model))
    return Recogniser(transcriber, Options(), None, Telemetry(), timeout_s=5.0)


# -- the session


def test_an_update_changes_what_it_names() -> None:
    session = Session.of_model("small")
    assert session.audio_form.rate_hz == 24_000
    assert session.vad == VadOptions()
    session = updated(
        session, {"audio": {"input": {"transcription": {"language": "en"}, "turn_detection": None}}}
    )
    assert (session.transcription.model, session.transcription.language, session.vad) == ("small", "en", None)
    session = updated(session, {"audio": {"input": {"format": {"type": "audio/pcmu"}}}})
    assert (session.audio_form.rate_hz, session.vad, session.transcription.language) == (8000, None, "en")
    session = updated(
        session, {"audio": {"input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": 300}}}}
    )
    assert session.vad == VadOptions(silence_duration_ms=300)
    session = updated(
        session, {"audio": {"input": {"turn_detection": {"type": "semantic_vad", "eagerness": "high"}}}}
    )
    assert session.vad == VadOptions(silence_duration_ms=300)
    told = session.described("small")["audio"]["input"]["turn_detection"]
    assert (told["type"], told["eagerness"]) == ("semantic_vad", "high")


def test_a_rate_is_that_of_its_format() -> None:
    session = Session()
    heard = []
    for chosen in ({"type": "audio/pcm", "rate": 16000}, {"type": "audio/pcmu"}, {"type": "audio/pcm"}):
        session = updated(session, {"audio": {"input": {"format": chosen}}})
        heard.append(session.audio_form.rate_hz)
    assert heard == [16000, 8000, 24000]


@pytest.mark.parametrize(
    ("changes", "kind", "field"),
    [
        (None, InvalidRequestError, "session"),
        ({"voice": "alloy"}, InvalidRequestError, "session.voice"),
        ({"type": "realtime"}, InvalidValueError, "session.type"),
        (
            {"audio": {"input": {"format": {"rate": 4000}}}},
            InvalidValueError,
            "session.audio.input.format.rate",
        ),
        (
            {"audio": {"input": {"format": {"type": "audio/pcmu", "rate": 16000}}}},
            InvalidValueError,
            "session.audio.input.format.rate",
        ),
        (
            {"audio": {"input": {"transcription": {"language": "en-US"}}}},
            InvalidValueError,
            "session.audio.input.transcription.language",
        ),
        (
            {"audio": {"input": {"turn_detection": {"threshold": 1}}}},
            InvalidValueError,
            "session.audio.input.turn_detection.threshold",
        ),
        (
            {"audio": {"input": {"turn_detection": {"type": "none"}}}},
            InvalidValueError,
            "session.audio.input.turn_detection.type",
        ),
        (
            {"audio": {"input": {"noise_reduction": {"type": "loud"}}}},
            InvalidValueError,
            "session.audio.input.noise_reduction.type",
        ),
    ],
)
def test_a_wrong_update_names_the_field(changes: object, kind: type[ClientError], field: str) -> None:
    with pytest.raises(kind) as caught:
        updated(Session(), changes)
    assert caught.value.param == field


def test_noise_reduction_is_accepted_and_told_back() -> None:
    for chosen in ({"type": "near_field"}, {"type": "far_field", "strength": 0.5}, None):
        session = updated(Session(), {"audio": {"input": {"noise_reduction": chosen}}})
        told = session.described("small")["audio"]["input"]["noise_reduction"]
        assert told == ({"strength": None, **chosen} if chosen is not None else None)


def test_a_null_that_says_nothing_is_as_if_it_was_not_there() -> None:
    chosen = {
        "format": {"type": "audio/pcm", "rate": 16000},
        "transcription": {"model": "small", "language": "en", "keywords": ["bee"]},
        "turn_detection": {"type": "server_vad", "threshold": 0.3, "silence_duration_ms": 300},
    }
    session = updated(Session(), {"audio": {"input": chosen}})
    pauses = {"type": None, "threshold": None, "prefix_padding_ms": None, "silence_duration_ms": None}
    for nothing in (
        {"type": None, "audio": None},
        {"audio": {"input": None}},
        {"audio": {"input": {"format": None, "transcription": None}}},
        {"audio": {"input": {"transcription": {"model": None, "keywords": None}, "turn_detection": pauses}}},
    ):
        assert updated(session, nothing) == session
    anew = updated(Session(), {"audio": {"input": {"turn_detection": pauses, "format": {"type": None}}}})
    assert (anew.vad, anew.audio_form) == (VadOptions(), Session().audio_form)
    assert updated(session, {"audio": {"input": {"turn_detection": None}}}).vad is None
    assert updated(session, {"audio": {"input": {"transcription": {"language": None}}}}).transcription == (
        session.transcription.model_copy(update={"language": None})
    )


def test_a_field_of_openai_that_is_not_offered_is_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        updated(Session(), {"audio": {"input": {"transcription": {"languages": ["en", "vi"]}}}})
    assert caught.value.param == "session.audio.input.transcription.languages"
    assert "one language is taken, in the field 'language'" in caught.value.message


@pytest.mark.parametrize(
    "changes", [{"voice": None}, {"audio": {"input": {"transcription": {"voice": None}}}}]
)
def test_an_unknown_field_is_refused_also_with_null(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match="voice"):
        updated(Session(), changes)


@pytest.mark.parametrize(
    ("changes", "field", "told"),
    [
        ({"turn_detection": {"idle_timeout_ms": 5000}}, "turn_detection.idle_timeout_ms", "null"),
        ({"transcription": 1}, "transcription", "an object"),
        ({"transcription": {"keywords": "Nguyen"}}, "transcription.keywords", "a list"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_so_in_words_of_json(
    changes: dict[str, object], field: str, told: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        updated(Session(), {"audio": {"input": changes}})
    assert caught.value.param == f"session.audio.input.{field}"
    assert caught.value.message.partition(" (given")[0] == f"{caught.value.param}: Input should be {told}"
