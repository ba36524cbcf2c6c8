"""Subtitles, OpenAI bodies, segments and casing: pure functions over transcripts."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.ctc import greedy
from api.frames import Frames
from api.normalise import lower, normalise, upper
from api.openai_format import delta_event, done_event, json_body, logprob_list, verbose_body
from api.subtitles import (
    MAX_CHARACTERS_PER_S,
    MAX_CUE_S,
    MAX_LINE_CHARACTERS,
    MAX_LINES,
    MIN_CUE_S,
    cues,
    to_srt,
    to_vtt,
)
from api.transcript import Segment, Token, Transcript, join_text, segments_of
from api.vocabulary import Vocabulary
from api.words import Word

VOCABULARY = Vocabulary(("<blank>", "▁", "a", "b", "c"), 0)


def make_segment(*words: Word) -> Segment:
    text = " ".join(word.text for word in words)
    tokens = tuple(Token(character, 1, -0.1) for character in text)
    return Segment(words[0].start_s, words[-1].end_s, text, words, tokens, -0.1, 0.01, 0.0, len(tokens))


def make_transcript(*segments: Segment, duration_s: float = 1000.0) -> Transcript:
    text = " ".join(segment.text for segment in segments)
    return Transcript(text, segments, duration_s, 0.5, "tiny", "en")


def spoken(texts: list[str], start_s: float = 0.0, each_s: float = 0.4) -> list[Word]:
    return [
        Word(text, start_s + index * each_s, start_s + index * each_s + 0.3, 0.9)
        for index, text in enumerate(texts)
    ]


class TestSubtitles:
    def test_srt_to_the_letter(self) -> None:
        transcript = make_transcript(
            make_segment(Word("hello", 0.5, 0.9, 0.9), Word("world", 1.0, 1.5, 0.8)),
            make_segment(Word("late", 3661.25, 3662.0, 0.9)),
            duration_s=3670,
        )
        assert to_srt(transcript) == (
            "1\n00:00:00,500 --> 00:00:01,500\nhello world\n\n2\n01:01:01,250 --> 01:01:02,083\nlate\n"
        )

    def test_vtt_to_the_letter_with_markup_escaped(self) -> None:
        transcript = make_transcript(make_segment(Word("<b>&", 0.0, 0.7, 0.9)))
        assert to_vtt(transcript) == "WEBVTT\n\n00:00:00.000 --> 00:00:00.833\n&lt;b&gt;&amp;\n"

    def test_nothing_said(self) -> None:
        assert to_srt(make_transcript()) == ""
        assert to_vtt(make_transcript()) == "WEBVTT\n"

    def test_a_cue_stays_to_be_read_where_nothing_follows(self) -> None:
        hasty = [Word("x" * 10, index * 0.2, index * 0.2 + 0.2, 0.9) for index in range(4)]  # 43 characters
        first, second = cues(make_transcript(make_segment(*hasty), make_segment(Word("end", 2.0, 2.1, 0.9))))
        assert (first.end_s, second.end_s) == (2.0, pytest.approx(2.0 + MIN_CUE_S))
        (alone,) = cues(make_transcript(make_segment(*hasty)))
        assert alone.end_s == pytest.approx(42 / MAX_CHARACTERS_PER_S)

    @given(st.lists(st.text("abcdefghij", min_size=1, max_size=30), min_size=1, max_size=80))
    def test_cues_keep_all_words_in_order_and_stay_readable(self, texts: list[str]) -> None:
        result = cues(make_transcript(make_segment(*spoken(texts))))
        assert " ".join(line for cue in result for line in cue.lines).split() == texts
        for cue in result:
            assert len(cue.lines) <= MAX_LINES
            assert all(len(line) <= MAX_LINE_CHARACTERS for line in cue.lines)
            assert 0 < cue.end_s - cue.start_s <= MAX_CUE_S + 0.5
        for before, after in pairwise(result):
            assert before.end_s <= after.start_s + 1e-9

    @given(st.floats(0, 360_000))
    def test_clock_is_valid_and_true_to_the_millisecond(self, time_s: float) -> None:
        text = to_srt(make_transcript(make_segment(Word("x", time_s, time_s + 1, 0.9))))
        found = re.search(r"\n(\d{2,}):([0-5]\d):([0-5]\d),(\d{3}) -->", text)
        assert found
        hours, minutes, seconds, milliseconds = map(int, found.groups())
        assert hours * 3600 + minutes * 60 + seconds + milliseconds / 1000 == pytest.approx(time_s, abs=6e-4)


class TestSegments:
    @staticmethod
    def decode(path: str, **options: float) -> list[Segment]:
        """``path``: one character per 20 ms frame, ``_`` is the blank and ``.`` the space."""
        ids = ["_.abc".index(character) for character in path]
        log_probs = np.full((len(ids), 5), math.log(0.025), np.float32)
        log_probs[np.arange(len(ids)), ids] = math.log(0.9)
        decoded = greedy(log_probs[None], np.array([len(ids)]), 0)[0]
        return segments_of(
            decoded,
            Frames(log_probs),
            VOCABULARY,
            frame_stride_s=0.02,
            window_start_s=options.get("start_s", 0.0),
            window_s=options.get("window_s", len(ids) * 0.02),
        )

    def test_one_utterance_is_one_segment(self) -> None:
        (segment,) = self.decode("__aa_b_.__c__", start_s=10.0)
        assert segment.text == "ab c"
        assert segment.start_s == pytest.approx(10.04)
        assert segment.end_s == pytest.approx(10.22)
        assert segment.avg_logprob == pytest.approx(math.log(0.9), abs=1e-5)
        assert segment.confidence == pytest.approx(0.9, abs=1e-5)
        assert [token.unit for token in segment.tokens] == ["a", "b", " ", "c"]
        assert [token.logprob for token in segment.tokens] == pytest.approx([math.log(0.9)] * 4, abs=1e-5)
        assert segment.window_start_s == 10.0
        assert len(segment.tokens) == 4
        assert [token.id for token in segment.tokens[1:3]] == [3, 1]
        assert segment.tokens[-1].unit == "c"

    def test_pauses_separate_segments_and_lose_nothing(self) -> None:
        segments = self.decode("ab." + "_" * 50 + "c.a" + "_" * 50 + ".b")
        assert [segment.text for segment in segments] == ["ab", "c a", "b"]
        assert sum(segment.token_frames for segment in segments) == 8
        assert "".join(token.unit for segment in segments for token in segment.tokens) == "ab c a b"

    def test_times_do_not_leave_the_window(self) -> None:
        """The last frame may reach beyond the end of the audio."""
        (segment,) = self.decode("__aa", start_s=10.0, window_s=0.07)
        assert segment.end_s == segment.words[-1].end_s == pytest.approx(10.07)

    def test_from_ten_seconds_on_a_shorter_pause_ends_a_segment(self) -> None:
        pauses_of_420_ms = self.decode("a" + ("." + "_" * 20 + "a") * 25)
        assert [len(segment.words) for segment in pauses_of_420_ms] == [24, 2]
        assert pauses_of_420_ms[0].end_s == pytest.approx(23 * 0.44 + 0.02)
        pauses_of_220_ms = self.decode("a" + ("." + "_" * 10 + "a") * 50)
        assert [len(segment.words) for segment in pauses_of_220_ms] == [51]

    def test_a_full_stop_in_the_pause_ends_neither_segment_nor_cue_there(self) -> None:
        vocabulary = Vocabulary(("<blank>", "▁silly", ".", "▁you"), 0, "bpe")
        ids = [0] * 10 + [1] + [0] * 60 + [2] + [0] * 20 + [3]
        log_probs = np.full((len(ids), 4), math.log(0.03), np.float32)
        log_probs[np.arange(len(ids)), ids] = math.log(0.9)
        decoded = greedy(log_probs[None], np.array([len(ids)]), 0)[0]
        segments = segments_of(
            decoded, Frames(log_probs), vocabulary, frame_stride_s=0.02, window_start_s=0.0, window_s=1.86
        )
        assert [segment.text for segment in segments] == ["silly.", "you"]
        assert [segment.end_s for segment in segments] == pytest.approx([0.22, 1.86])
        assert [len(segment.tokens) for segment in segments] == [2, 1]
        assert cues(make_transcript(*segments))[0].end_s == pytest.approx(0.2 + MIN_CUE_S)

    def test_no_speech_prob_is_the_product_of_the_blanks(self) -> None:
        (segment,) = self.decode("___a__")
        assert segment.no_speech_prob == pytest.approx(0.9**5 * 0.025, rel=1e-4)

    def test_a_pause_belongs_to_the_segments_around_it_by_halves(self) -> None:
        first, second = self.decode("ab." + "_" * 50 + "c")
        assert first.no_speech_prob == pytest.approx(0.025**3 * 0.9**25, rel=1e-4)
        assert second.no_speech_prob == pytest.approx(0.9**25 * 0.025, rel=1e-4)

    def test_only_blanks_give_no_segment(self) -> None:
        assert self.decode("_" * 20) == []

    def test_noise_is_doubtful_single_letters(self) -> None:
        doubtful = make_segment(*spoken(["e", "a", "o"]))
        assert not doubtful.is_like_noise(0.5)
        low = Segment(0, 1, "e a o", doubtful.words, (), math.log(0.44), 0.0, 0.0, 3)
        assert low.is_like_noise(0.5)
        assert not low.is_like_noise(0.0)
        words = Segment(0, 1, "no way", tuple(spoken(["no", "way"])), (), math.log(0.44), 0.0, 0.0, 3)
        assert not words.is_like_noise(0.5)

    @pytest.mark.parametrize(("posterior", "noise"), [(0.4, True), (0.6, False)])
    def test_sure_spaces_do_not_vouch_for_a_letter(self, posterior: float, noise: bool) -> None:
        ids = [1] * 8 + [2] + [1] * 8
        log_probs = np.full((len(ids), 5), math.log(0.01), np.float32)
        log_probs[np.arange(len(ids)), ids] = math.log(0.96)
        log_probs[8] = math.log((1 - posterior) / 4)
        log_probs[8, 2] = math.log(posterior)
        decoded = greedy(log_probs[None], np.array([len(ids)]), 0)[0]
        (segment,) = segments_of(
            decoded, Frames(log_probs), VOCABULARY, frame_stride_s=0.02, window_start_s=0.0, window_s=0.34
        )
        assert segment.text == "a"
        assert segment.confidence > 0.9
        assert segment.is_like_noise(0.5) is noise

    def test_words_that_were_hardly_heard_are_noise(self) -> None:
        words = tuple(spoken(["no", "way"]))
        for confidence, noise in ((0.16, False), (0.14, True)):
            segment = Segment(0, 1, "no way", words, (), math.log(confidence), 0.0, 0.0, 3)
            assert segment.is_like_noise(0.5) is noise
            assert not segment.is_like_noise(0.0)

    def test_a_word_by_itself_must_be_heard_twice_as_well(self) -> None:
        for confidence, noise in ((0.31, False), (0.29, True)):
            words = (Word("the", 0.0, 0.3, confidence),)
            segment = Segment(0, 1, "the", words, (), math.log(confidence), 0.0, 0.0, 3)
            assert segment.is_like_noise(0.5) is noise
            assert not segment.is_like_noise(0.0)


def test_confidence_of_the_whole_counts_every_frame_once() -> None:
    words = tuple(spoken(["no"]))
    clear, doubtful = (
        Segment(0, 1, "no", words, (), logprob, 0.0, 0.0, frames)
        for logprob, frames in ((-0.1, 30), (-0.9, 10))
    )
    assert clear.confidence == pytest.approx(math.exp(-0.1))
    assert make_transcript(clear, doubtful).confidence == pytest.approx(math.exp(-0.3))
    assert make_transcript().confidence is None


def test_real_time_factor() -> None:
    assert make_transcript(duration_s=4.0).real_time_factor == 0.125
    assert make_transcript(duration_s=0.0).real_time_factor == 0.0


def spelled(entries: list[dict[str, Any]]) -> str:
    """What the bytes of a list of log-posteriors write."""
    return bytes(byte for entry in entries for byte in entry["bytes"]).decode()


_KINDS = {
    "chars": Vocabulary(("<blank>", "▁", "e", "\u0301", "n", "'"), 0),
    "wordpiece": Vocabulary(("<blank>", "▁", "▁he", "llo", "▁e", "\u0301", ".", "a▁b"), 0, "wordpiece"),
    "bpe": Vocabulary(
        ("<blank>", "▁", "▁caf", "Ã", "©", ".", "▁Ã", "Ċ", "e", "Ì", "ģ", ".▁", "<|en|>"),
        0,
        "bpe",
        frozenset({12}),
    ),
}


class TestLogprobsJoinToTheText:
    """Of whatever a model may emit, over several windows and segments."""

    @given(st.sampled_from(sorted(_KINDS)), st.data())
    def test_in_every_body_and_event(self, kind: str, data: st.DataObject) -> None:
        vocabulary = _KINDS[kind]
        token = st.tuples(st.integers(1, len(vocabulary) - 1), st.sampled_from([1, 1, 1, 50]))
        segments: list[Segment] = []
        texts: list[str] = []
        for window in data.draw(st.lists(st.lists(token, max_size=12), min_size=1, max_size=3)):
            ids = [part for token_id, blanks in window for part in (token_id, *[0] * blanks)]
            if not ids:
                continue
            log_probs = np.full((len(ids), len(vocabulary)), math.log(0.01), np.float32)
            log_probs[np.arange(len(ids)), ids] = math.log(0.9)
            decoded = greedy(log_probs[None], np.array([len(ids)]), 0)[0]
            texts.append(vocabulary.decode(decoded.token_ids.tolist()))
            segments += segments_of(
                decoded,
                Frames(log_probs),
                vocabulary,
                frame_stride_s=0.02,
                window_start_s=0.0,
                window_s=len(ids) * 0.02,
            )
        text = " ".join(filter(None, texts))
        transcript = replace(make_transcript(*segments), text=join_text(segments))
        assert transcript.text == text
        deltas = [
            delta_event(segment, first=index == 0, logprobs=True) for index, segment in enumerate(segments)
        ]
        for delta in deltas:
            assert spelled(delta["logprobs"]) == delta["delta"]
        listed = [entry for delta in deltas for entry in delta["logprobs"]]
        assert spelled(listed) == text
        assert len(listed) == sum(len(segment.tokens) for segment in segments)
        assert done_event(transcript, logprobs=True)["logprobs"] == listed
        assert json_body(transcript, logprobs=True)["logprobs"] == listed
        assert verbose_body(transcript, (), logprobs=True)["logprobs"] == listed


class TestOpenAIBodies:
    def test_json_has_text_and_usage_only(self) -> None:
        body = json_body(make_transcript(make_segment(*spoken(["hi"])), duration_s=1.25), logprobs=False)
        assert body == {"text": "hi", "usage": {"type": "duration", "seconds": 1.25}}

    def test_logprobs_have_an_entry_per_token_and_write_the_space(self) -> None:
        segment = make_segment(*spoken(["a", "ü"]))
        tokens = (Token("a", 3, -0.5), Token(" ", 1, -0.25), Token("ü", 2, 0.0), Token(" ", 1, -0.125))
        assert logprob_list([replace(segment, tokens=tokens)]) == [
            {"token": "a", "logprob": -0.5, "bytes": [97]},
            {"token": " ", "logprob": -0.25, "bytes": [32]},
            {"token": "ü", "logprob": 0.0, "bytes": [195, 188]},
            {"token": "", "logprob": -0.125, "bytes": []},
        ]

    def test_logprobs_of_byte_level_tokens_join_to_the_text(self) -> None:
        vocabulary = Vocabulary(("<blank>", "▁caf", "Ã", "©"), 0, kind="bpe")
        log_probs = np.full((6, 4), -9.0, np.float32)
        log_probs[np.arange(6), [1, 0, 2, 0, 3, 0]] = -0.1
        decoded = greedy(log_probs[None], np.array([6]), 0)[0]
        (segment,) = segments_of(
            decoded, Frames(log_probs), vocabulary, frame_stride_s=0.02, window_start_s=0.0, window_s=0.12
        )
        assert [entry["token"] for entry in logprob_list([segment])] == ["caf", "�", "�"]
        assert spelled(logprob_list([segment])) == "café"
        assert spelled(logprob_list([segment], first=False)) == " café"
        assert spelled(logprob_list([segment, segment])) == "café café"

    def test_verbose_values_come_from_the_transcript(self) -> None:
        segment = make_segment(*spoken(["one", "two"], start_s=5.0))
        body = verbose_body(make_transcript(segment), ("word", "segment"), logprobs=False)
        (written,) = body["segments"]
        assert written["compression_ratio"] == pytest.approx(7 / len(zlib.compress(b"one two")), abs=1e-4)
        assert written["avg_logprob"] == -0.1
        assert written["no_speech_prob"] == 0.01
        assert [word["word"] for word in body["words"]] == ["one", "two"]
        assert body["duration"] == 1000.0

    @pytest.mark.parametrize(("code", "name"), [("vi", "vietnamese"), ("az", "azerbaijani"), ("tlh", "tlh")])
    def test_the_language_is_named_as_openai_names_it(self, code: str, name: str) -> None:
        transcript = replace(make_transcript(make_segment(*spoken(["one"]))), language=code)
        assert verbose_body(transcript, (), logprobs=False)["language"] == name


@pytest.mark.parametrize(
    ("text", "language", "lowered", "raised"),
    [("DIŞ İZMİR", "tr", "dış izmir", "DIŞ İZMİR"), ("İŞIQ", "az", "işıq", "İŞIQ"), ("ID", "en", "id", "ID")],
)
def test_casing_follows_the_language(text: str, language: str, lowered: str, raised: str) -> None:
    assert lower(text, language) == lowered
    assert upper(lowered, language) == raised


def test_normalise_composes_and_joins_white_space() -> None:
    decomposed = "Việt  Nam\n".replace("ệ", "ệ")
    assert normalise(decomposed, ("nfc", "lowercase"), "vi") == "việt nam"
