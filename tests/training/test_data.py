"""Manifests, import, validation, splits and batches."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from training.calibration import manifest_waveforms
from training.data import __main__ as command
from training.data import importers
from training.data.audio import UndecodableAudioError, decode_waveform, load_waveform
from training.data.manifest import Utterance, read_manifest, write_manifest
from training.data.sampler import DurationBatchSampler
from training.data.split import little_to_train_on, speaker_of, split_by_speaker
from training.data.synthetic import make_corpus
from training.data.validate import Limits, validate
from training.distillation.cache import write_pcm
from training.distillation.dataset import read_utterances
from training.errors import DataError, EmptyManifestError, ManifestError, SplitError
from training.text import normaliser
from training.vocabulary import CharacterCodec, ctc_frames_needed


def tone(path: Path, seconds: float = 1.0, rate_hz: int = 16_000, gain: float = 0.3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = gain * np.sin(2 * np.pi * 300 * np.arange(round(seconds * rate_hz)) / rate_hz)
    soundfile.write(path, samples, rate_hz)
    return path


# --- manifests ---------------------------------------------------------------------------------------


def test_manifest_round_trip(tmp_path: Path) -> None:
    rows = [
        Utterance(tone(tmp_path / "a" / "1.wav"), "bir iki", 1.0, 0.25, "s1", "tr", "mine", "CC0-1.0"),
        Utterance(Path("/elsewhere/2.wav"), "üç"),
    ]
    path = write_manifest(tmp_path / "manifest.jsonl", rows)
    assert read_manifest(path) == rows
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert first["audio_filepath"] == "a/1.wav"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not a manifest row"),
        ("[]", "expected an object"),
        ('{"text": "a"}', "audio_filepath is missing"),
        ('{"audio_filepath": "a.wav", "text": 3}', "text is int"),
        ('{"audio_filepath": "a.wav", "text": "a", "duration": "long"}', "could not convert"),
        ('{"audio_filepath": "a.wav", "text": "a", "duration": NaN}', "duration is nan, expected seconds"),
        (
            '{"audio_filepath": "a.wav", "text": "a", "offset": -1}',
            "offset is -1, expected 0 or more seconds",
        ),
        ('{"audio_filepath": "a.wav", "text": "a", "offset": Infinity}', "offset is inf, expected 0 or more"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"audio_filepath": "a.wav", "text": "a"}\n' + line + "\n")
    with pytest.raises(ManifestError, match=rf"manifest.jsonl:2: .*{problem}"):
        read_manifest(path)


def test_empty_and_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such manifest"):
        read_manifest(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(EmptyManifestError, match="the manifest is empty"):
        read_manifest(tmp_path / "empty.jsonl")


# --- import ------------------------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    for name in ("anna/1.wav", "anna/2.flac", "boris/1.wav", "lonely.wav"):
        tone(tmp_path / name)
    for name in ("anna/1.txt", "anna/2.txt", "boris/1.txt"):
        (tmp_path / name).write_text(" да\nнет ", encoding="utf-8")
    rows = importers.from_folder(tmp_path, language="ru")
    assert [(row.speaker, row.text) for row in rows] == [("anna", "да нет")] * 2 + [("boris", "да нет")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmptyManifestError, match=r"no recording with a \.txt"):
        importers.from_folder(tmp_path / "empty")
    with pytest.raises(ManifestError, match="no such folder"):
        importers.from_folder(tmp_path / "nothing")


def test_a_recording_in_two_forms_is_one_utterance(tmp_path: Path) -> None:
    for name in ("7.aac", "7.flac", "7.wav", "8.wav"):
        tone(tmp_path / name.replace(".aac", ".wav")).rename(tmp_path / name)
    tone(tmp_path / "7.wav")
    for name in ("7.txt", "8.txt"):
        (tmp_path / name).write_text("да", encoding="utf-8")
    assert [row.audio.name for row in importers.from_folder(tmp_path)] == ["7.flac", "8.wav"]


def test_common_voice_tsv(tmp_path: Path) -> None:
    tone(tmp_path / "clips" / "a.wav")
    table = tmp_path / "validated.tsv"
    table.write_text('client_id\tpath\tsentence\tlocale\nabc\ta.wav\tO "evet" dedi.\ttr\n', encoding="utf-8")
    (row,) = importers.from_table(table)
    assert row == Utterance(tmp_path / "clips" / "a.wav", 'O "evet" dedi.', speaker="abc", language="tr")


def test_a_table_whose_paths_name_the_clips_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tone(tmp_path / "clips" / "b.wav")
    table = tmp_path / "validated.tsv"
    table.write_text("path\tsentence\nclips/a.wav\tbir\nclips/b.wav\tiki\n", encoding="utf-8")
    rows = importers.from_table(table)
    assert [row.audio for row in rows] == [tmp_path / "clips" / name for name in ("a.wav", "b.wav")]
    given = ["import", "table", str(table), "--out", str(tmp_path / "manifest.jsonl")]
    assert command.main(given) == 0
    said = capsys.readouterr().out
    assert f"2 utterances, 1 without their recording (the first: {tmp_path / 'clips' / 'a.wav'}) -> " in said


def test_csv_with_other_names(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text('file,transcript,speaker\nx.wav,"yes, no",7\n', encoding="utf-8")
    (row,) = importers.from_table(table)
    assert (row.audio, row.text, row.speaker) == (tmp_path / "x.wav", "yes, no", "7")


def test_table_problems(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("file,words\nx.wav,hello\n")
    with pytest.raises(ManifestError, match=r"none of the columns .*sentence"):
        importers.from_table(table)
    table.write_text("file,text\n")
    with pytest.raises(EmptyManifestError, match="no rows"):
        importers.from_table(table)
    table.write_text("file,text\n,hello\n")
    with pytest.raises(ManifestError, match=r"rows\.csv:2"):
        importers.from_table(table)
    table.write_text("file,text\nx.wav,hello\nx.wav,hello, world\n")
    with pytest.raises(ManifestError, match=r"rows\.csv:3: 3 fields, the header has 2; .*needs quotes"):
        importers.from_table(table)
    with pytest.raises(ManifestError, match=r"none: no such folder of recordings"):
        importers.from_table(table, clips=tmp_path / "none")


def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text('file,text\n1.wav,"one\n2.wav,two\n3.wav,three\n')
    with pytest.raises(ManifestError, match=r"rows\.csv:2: .*quote"):
        importers.from_table(table)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    tone(tmp_path / "1.wav")
    (tmp_path / "1.txt").write_text("да", encoding="utf-8-sig")
    (row,) = importers.from_folder(tmp_path)
    assert row.text == "да"
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"audio_filepath": "1.wav", "text": "да"}\n', encoding="utf-8-sig")
    assert [found.text for found in read_manifest(manifest)] == ["да"]


def test_another_encoding_is_one_line_that_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tone(tmp_path / "1.wav")
    (tmp_path / "1.txt").write_bytes("да".encode("cp1251"))
    (tmp_path / "rows.csv").write_bytes("file,text\n1.wav,да\n".encode("cp1251"))
    (tmp_path / "rows.json").write_bytes('{"audio_filepath": "1.wav", "text": "да"}\n'.encode("cp1251"))
    for kind, source, named in (
        ("folder", tmp_path, "1.txt"),
        ("table", tmp_path / "rows.csv", "rows.csv"),
        ("nemo", tmp_path / "rows.json", "rows.json"),
    ):
        assert command.main(["import", kind, str(source), "--out", str(tmp_path / "out.jsonl")]) == 2
        assert f"{named}: not UTF-8" in capsys.readouterr().err


def test_what_the_file_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tone(tmp_path / "1.wav")
    (tmp_path / "1.txt").write_text("да", encoding="utf-8")
    out = tmp_path / "1.wav" / "out.jsonl"
    assert command.main(["import", "folder", str(tmp_path), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_nemo(tmp_path: Path) -> None:
    path = tmp_path / "nemo.json"
    path.write_text('{"audio_filepath": "a.wav", "text": "hi", "duration": 2.5, "offset": 1.0}\n')
    (row,) = importers.from_nemo(path)
    assert (row.duration_s, row.offset_s) == (2.5, 1.0)


def test_hugging_face_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    paths = [tone(tmp_path / "in" / f"{index}.flac", 0.5 + index) for index in range(3)]
    columns = {
        "audio": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "transcription": ["bir", "iki", "üç"],
        "who": [1, 2, 1],
    }
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
    options = {"data_files": str(tmp_path / "rows.parquet"), "text_column": "transcription"}
    rows = importers.from_hugging_face(
        "parquet", tmp_path / "audio", speaker_column="who", limit=2, **options
    )
    assert [(row.text, row.speaker) for row in rows] == [("bir", "1"), ("iki", "2")]
    assert rows[1].audio.read_bytes() == paths[1].read_bytes()
    before = rows[0].audio.stat().st_mtime_ns
    again = importers.from_hugging_face("parquet", tmp_path / "audio", **options)
    assert len(again) == 3
    assert again[0].audio.stat().st_mtime_ns == before, "a resumed import writes nothing twice"
    with pytest.raises(ManifestError, match="no column 'text'"):
        importers.from_hugging_face("parquet", tmp_path / "audio", data_files=options["data_files"])


def test_hugging_face_speakers_that_nobody_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    recording = tone(tmp_path / "0.flac", 0.5).read_bytes()
    audio = [{"bytes": recording, "path": "0.flac"}] * 3
    columns = {"audio": audio, "text": ["bir"] * 3, "who": [0, None, 2]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
    rows = importers.from_hugging_face(
        "parquet", tmp_path / "audio", speaker_column="who", data_files=str(tmp_path / "rows.parquet")
    )
    assert [row.speaker for row in rows] == ["0", "", "2"]


def test_a_second_hugging_face_import_has_recordings_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    for name, seconds in (("first", 0.5), ("second", 1.5)):
        recording = tone(tmp_path / name / "0.flac", seconds).read_bytes()
        columns = {"audio": [{"bytes": recording, "path": "0.flac"}], "text": [name]}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f"{name}.parquet")
    rows = [
        importers.from_hugging_face(
            "parquet", tmp_path / "audio", data_files=str(tmp_path / f"{name}.parquet")
        )
        for name in ("first", "second", "first")
    ]
    heard = [(row.text, len(load_waveform(row.audio, 16_000))) for (row,) in rows]
    assert heard == [("first", 8_000), ("second", 24_000), ("first", 8_000)]
    assert rows[0] == rows[2]


@pytest.mark.parametrize("form", ["audiofolder", "webdataset", "json"])
def test_hugging_face_files_in_folders_and_tars(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forms beside parquet; torchcodec, with which `datasets` would decode, is not needed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("datasets")
    source = tmp_path / "in"
    paths = [tone(source / f"{index}.wav", 0.5 + index) for index in range(2)]
    if form == "audiofolder":
        lines = [{"file_name": path.name, "text": "bir"} for path in paths]
        (source / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = {"data_dir": str(source)}
    elif form == "json":
        lines = [
            {"audio": str(paths[0]), "text": "bir"},
            {"audio": paths[1].as_uri(), "text": "bir"},
        ]
        (source / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = {"data_files": str(source / "rows.jsonl")}
    else:
        with tarfile.open(source / "rows.tar", "w") as archive:
            for path in paths:
                path.with_suffix(".txt").write_text("bir")
                archive.add(path, path.name)
                archive.add(path.with_suffix(".txt"), path.with_suffix(".txt").name)
        options = {"data_files": str(source / "rows.tar"), "audio_column": "wav", "text_column": "txt"}
    rows = importers.from_hugging_face(form, tmp_path / "audio", **options)
    assert [row.text for row in rows] == ["bir", "bir"]
    assert [len(load_waveform(row.audio, 16_000)) for row in rows] == [8_000, 24_000]


def test_a_hub_that_does_not_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = [
        "import",
        "huggingface",
        str(tmp_path / "no" / "data"),
        "--out",
        str(tmp_path / "manifest.jsonl"),
    ]
    assert command.main(given) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_language_and_licence_of_a_table_that_names_neither(tmp_path: Path) -> None:
    table, manifest = tmp_path / "rows.csv", tmp_path / "manifest.jsonl"
    table.write_text("file,text,language\nx.wav,bir,\ny.wav,odin,ru\n")
    given = [
        "import",
        "table",
        str(table),
        "--language",
        "az",
        "--licence",
        "CC0-1.0",
        "--out",
        str(manifest),
    ]
    assert command.main(given) == 0
    assert [(row.language, row.licence) for row in read_manifest(manifest)] == [
        ("az", "CC0-1.0"),
        ("ru", "CC0-1.0"),
    ]


# --- audio -------------------------------------------------------------------------------------------


def test_resamples_and_cuts(tmp_path: Path) -> None:
    path = tone(tmp_path / "a.wav", 2.0, rate_hz=44_100)
    whole = load_waveform(path, 16_000)
    assert whole.dtype == np.float32
    assert len(whole) == 32_000
    part = load_waveform(path, 16_000, offset_s=0.5, duration_s=1.0)
    assert len(part) == 16_000
    np.testing.assert_allclose(part[200:-200], whole[8_200:23_800], atol=2e-3)


def test_decodes_what_libsndfile_cannot(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "a.m4a"
    samples = (0.3 * np.sin(2 * np.pi * 300 * np.arange(16_000) / 16_000)).astype(np.float32)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    decoded = load_waveform(path, 16_000)
    assert abs(len(decoded) / 16_000 - 1.0) < 0.2
    assert 0.25 < np.abs(decoded).max() < 0.4
    assert np.array_equal(decode_waveform(path.read_bytes(), "a", 16_000), decoded)
    row = {"audio_filepath": "a.m4a", "duration": 0.5, "offset": 0.25, "speaker": "x"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row))
    write_pcm(read_utterances(tmp_path / "manifest.jsonl"), tmp_path, tmp_path)
    pcm = np.fromfile(tmp_path / "pcm.i16", np.int16)
    np.testing.assert_allclose(pcm / 32767, decoded[4_000:12_000], atol=1e-4)


def test_stretches_of_one_recording(tmp_path: Path) -> None:
    """The first stretch starts at 0 and is no more the whole recording than the others are."""
    tone(tmp_path / "long.wav", 10.0)
    lines = [
        {"audio_filepath": "long.wav", "text": "a", "duration": 2.0, "offset": 0.0},
        {"audio_filepath": "long.wav", "text": "b", "duration": 3.0, "offset": 2.0},
        {"audio_filepath": "long.wav", "text": "c", "duration": 9.996},
        {"audio_filepath": "long.wav", "text": "d", "duration": -1},
    ]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept, _ = validate(read_manifest(manifest), normalise=normaliser("en"), outside=lambda _: [])
    assert [row.duration_s for row in kept] == [2.0, 3.0, 10.0, 10.0]
    assert [len(samples) for samples, _ in manifest_waveforms(manifest, 16_000)] == [
        32_000,
        48_000,
        160_000,
        160_000,
    ]


def test_undecodable_and_missing(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"not audio" * 100)
    with pytest.raises(UndecodableAudioError, match=r"a\.wav"):
        load_waveform(tmp_path / "a.wav", 16_000)
    (tmp_path / "manifest.jsonl").write_text('{"audio_filepath": "a.wav", "duration": 1, "id": "spoken-7"}')
    with pytest.raises(UndecodableAudioError, match=r"^spoken-7: "):
        write_pcm(read_utterances(tmp_path / "manifest.jsonl"), tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match="no such recording"):
        load_waveform(tmp_path / "b.wav", 16_000)


def mp3(path: Path, samples: np.ndarray, *, states_length: bool = True) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format="mp3", options={"write_xing": str(int(states_length))}) as container:
        stream = container.add_stream("libmp3lame", rate=16_000, layout="mono")
        stream.codec_context.qscale = True
        stream.codec_context.global_quality = 2 * 118
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path


def test_an_mp3_that_does_not_state_its_length_is_read_to_its_end(tmp_path: Path) -> None:
    """libsndfile takes it for as long as it would be if all of it had the first frame's rate."""
    noise = 0.3 * np.random.default_rng(0).standard_normal(32_000)
    samples = np.concatenate([noise, np.zeros(64_000)])
    path = mp3(tmp_path / "a.mp3", samples, states_length=False)
    assert abs(len(load_waveform(path, 16_000)) - 96_000) < 3_200


# --- validation --------------------------------------------------------------------------------------


def test_validation_says_why(tmp_path: Path) -> None:
    codec = CharacterCodec("abc")
    (tmp_path / "noise.wav").write_bytes(b"x" * 2000)
    rows = [
        Utterance(tone(tmp_path / "good.wav"), "A b!"),
        Utterance(tmp_path / "gone.wav", "a"),
        Utterance(tmp_path / "noise.wav", "a"),
        Utterance(tone(tmp_path / "silent.wav", gain=0.0), "a"),
        Utterance(tone(tmp_path / "short.wav", 0.1), "a"),
        Utterance(tone(tmp_path / "long.wav", 4.0), "a"),
        Utterance(tone(tmp_path / "empty.wav"), "?!"),
        Utterance(tone(tmp_path / "foreign.wav"), "a b7 ж ж"),
        Utterance(tone(tmp_path / "dense.wav"), "aa" * 30),
        Utterance(tone(tmp_path / "mute.wav"), "c"),
    ]
    kept, report = validate(
        rows,
        normalise=normaliser("xx"),
        outside=codec.outside,
        frames_needed=lambda text: ctc_frames_needed(codec.encode(text.replace("c", ""))),
        frames_of=lambda samples: samples // 320,
        limits=Limits(max_duration_s=3.0),
    )
    assert [(row.audio.name, row.text, row.duration_s) for row in kept] == [("good.wav", "a b", 1.0)]
    reasons = {Path(entry["audio_filepath"]).stem: entry["reason"] for entry in report.dropped}
    assert reasons == {
        "gone": "missing_file",
        "noise": "undecodable",
        "silent": "silent",
        "short": "too_short",
        "long": "too_long",
        "empty": "empty_text",
        "foreign": "outside_vocabulary",
        "dense": "text_too_long",
        "mute": "no_tokens",
    }
    assert dict(report.outside) == {"7": 1, "ж": 1}
    report.write(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert stored["kept"] == 1
    assert stored["dropped"] == 9
    assert stored["reasons"]["silent"]["count"] == 1


@pytest.mark.parametrize("form", ["wav", "mp3"])
def test_a_truncated_recording_is_dropped(tmp_path: Path, form: str) -> None:
    whole, cut = tmp_path / f"whole.{form}", tmp_path / f"cut.{form}"
    noise = 0.3 * np.random.default_rng(0).standard_normal(64_000)
    if form == "mp3":
        mp3(whole, noise)
    else:
        soundfile.write(whole, noise, 16_000)
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    rows = [
        Utterance(whole, "a"),
        Utterance(whole, "a", 1.0, 3.0),
        Utterance(whole, "a", 9.0),
        Utterance(cut, "a", 1.0),
        Utterance(cut, "a"),
        Utterance(cut, "a", 1.0, 1.5),
    ]
    kept, report = validate(rows, normalise=str.lower, outside=lambda _: [])
    assert [row.audio for row in kept] == [whole, whole, whole, cut]
    assert report.reasons == {"truncated": 2}


def test_a_wave_file_from_a_pipe_is_not_truncated(tmp_path: Path) -> None:
    content = bytearray(tone(tmp_path / "a.wav").read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = content[4:8] = b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(content)
    kept, _ = validate([Utterance(tmp_path / "a.wav", "a")], normalise=str.lower, outside=lambda _: [])
    assert [row.duration_s for row in kept] == [1.0]


def test_validation_keeps_an_apostrophe_that_the_letters_have(tmp_path: Path) -> None:
    manifest = write_manifest(
        tmp_path / "manifest.jsonl", [Utterance(tone(tmp_path / "a.wav"), "П’ять!", language="uk")]
    )
    out = tmp_path / "valid.jsonl"
    given = ["validate", str(manifest), "--language", "uk", "--letters", "пять'", "--out", str(out)]
    assert command.main(given) == 0
    assert [row.text for row in read_manifest(out)] == ["п'ять"]


def test_wrong_alphabet_ends_with_a_message(tmp_path: Path) -> None:
    codec = CharacterCodec("абв")
    with pytest.raises(
        EmptyManifestError, match=r"outside_vocabulary.*characters outside the vocabulary: 'h'x1"
    ):
        validate([Utterance(tone(tmp_path / "a.wav"), "hello")], normalise=str.lower, outside=codec.outside)


def test_where_nothing_is_left_the_report_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "manifest.jsonl", [Utterance(tmp_path / "gone.wav", "hello")])
    given = ["validate", str(manifest), "--language", "en", "--out", str(tmp_path / "valid.jsonl")]
    assert command.main(given) == 2
    assert f"the first is {tmp_path / 'gone.wav'}: the recording does not exist" in capsys.readouterr().err
    report = json.loads((tmp_path / "valid.report.json").read_text(encoding="utf-8"))
    assert [entry["reason"] for entry in report["utterances"]] == ["missing_file"]


def test_an_alphabet_that_cannot_be_had_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "manifest.jsonl", [Utterance(tone(tmp_path / "a.wav"), "")])
    given = ["validate", str(manifest), "--language", "kk", "--out", str(tmp_path / "valid.jsonl")]
    assert command.main(given) == 2
    assert "error: --letters: language 'kk' has no alphabet here" in capsys.readouterr().err
    assert command.main([*given, "--letters", "abca"]) == 2
    assert "error: --letters: an alphabet lists each letter once" in capsys.readouterr().err


# --- splits ------------------------------------------------------------------------------------------


def rows_of(*counts: int) -> list[Utterance]:
    return [
        Utterance(Path(f"{speaker}_{index}.wav"), "a", 1.0, speaker=f"s{speaker}")
        for speaker, count in enumerate(counts)
        for index in range(count)
    ]


@given(st.lists(st.integers(1, 20), min_size=3, max_size=40), st.integers(0, 5))
def test_no_speaker_is_in_two_parts(counts: list[int], seed: int) -> None:
    rows = rows_of(*counts)
    split = split_by_speaker(rows, seed=seed)
    heard = [{speaker_of(row) for row in part} for part in split.parts().values()]
    assert all(heard)
    assert not heard[0] & heard[1]
    assert not heard[0] & heard[2]
    assert not heard[1] & heard[2]
    assert sorted(map(id, rows)) == sorted(id(row) for part in split.parts().values() for row in part)
    assert split_by_speaker(list(reversed(rows)), seed=seed).train == [
        row for row in reversed(rows) if row in split.train
    ]


def test_fractions_are_met_where_speakers_allow() -> None:
    split = split_by_speaker(rows_of(*[10] * 50))
    assert [len(part) for part in split.parts().values()] == [400, 50, 50]
    assert split_by_speaker(rows_of(*[10] * 50), seed=1).test != split.test


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("counts", [(36, 3, 3, 3), (90, 1, 1), (100, 9, 8, 7, 6, 5, 4)])
def test_a_speaker_of_most_recordings_is_trained_on(counts: tuple[int, ...], seed: int) -> None:
    split = split_by_speaker(rows_of(*counts), seed=seed)
    assert all(split.parts().values())
    assert "s0" in {row.speaker for row in split.train}
    assert not little_to_train_on(split, (0.8, 0.1, 0.1))


def test_speakers_that_are_all_large_stay_in_their_order() -> None:
    tested = {split_by_speaker(rows_of(10, 11, 12, 13), seed=seed).test[0].speaker for seed in range(20)}
    assert tested == {"s0", "s1", "s2", "s3"}


def test_little_to_train_on_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_manifest(tmp_path / "manifest.jsonl", rows_of(20, 20, 20))
    assert command.main(["split", str(manifest), "--out", str(tmp_path)]) == 0
    assert "warning: train has 33% of the data, fractions ask for 80%" in capsys.readouterr().err
    manifest = write_manifest(tmp_path / "manifest.jsonl", rows_of(*[2] * 30))
    assert command.main(["split", str(manifest), "--out", str(tmp_path)]) == 0
    assert "warning" not in capsys.readouterr().err


def test_one_utterance_cannot_be_split() -> None:
    with pytest.raises(SplitError, match=r"at least 3 speakers, the data has 1 \(1 utterances\)"):
        split_by_speaker(rows_of(1))
    with pytest.raises(SplitError, match="leave `speaker` out of the manifest"):
        split_by_speaker(rows_of(9))
    nameless = [replace(row, speaker="") for row in rows_of(9)]
    assert all(split_by_speaker(nameless).parts().values()), "as it says"
    with pytest.raises(SplitError, match="add up to 1"):
        split_by_speaker(rows_of(1, 1, 1), (0.5, 0.1, 0.1))


def test_recordings_without_speaker_count_one_by_one() -> None:
    rows = [Utterance(Path(f"{index}.wav"), "a", 1.0) for index in range(10)]
    assert [len(part) for part in split_by_speaker(rows).parts().values()] == [8, 1, 1]


# --- batches -----------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.1, 20.0), min_size=1, max_size=200), st.integers(0, 3), st.booleans())
def test_batches_hold_each_utterance_once_within_the_limit(
    durations: list[float], epoch: int, shuffle: bool
) -> None:
    sampler = DurationBatchSampler(durations, 40.0, max_items=16, shuffle=shuffle)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(len(durations)))
    assert all(max(durations[i] for i in batch) * len(batch) <= 40.0 + 1e-9 for batch in batches)
    assert all(len(batch) <= 16 for batch in batches)
    assert len(sampler) == len(batches)
    assert list(sampler) == batches, "the same epoch gives the same batches"


def test_epochs_differ_and_padding_is_small() -> None:
    durations = np.random.default_rng(0).uniform(1, 15, 500).tolist()
    sampler = DurationBatchSampler(durations, 120.0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    padded = sum(max(durations[i] for i in batch) * len(batch) for batch in first)
    assert sum(durations) / padded > 0.85


@pytest.mark.parametrize("seed", range(5))
def test_every_epoch_has_as_many_batches(seed: int) -> None:
    durations = np.random.default_rng(seed).uniform(0.5, 3, 40).tolist()
    sampler = DurationBatchSampler(durations, 9.0, seed=seed)
    counts = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        counts.add(len(list(sampler)))
    assert counts == {len(sampler)}


def test_goes_on_within_an_epoch() -> None:
    sampler = DurationBatchSampler(np.random.default_rng(0).uniform(1, 15, 100).tolist(), 60.0)
    sampler.set_epoch(3)
    third = list(sampler)
    sampler.go_on_from(3, 5)
    assert list(sampler) == third[5:]
    assert list(sampler) == third, "only once"
    sampler.go_on_from(2, len(sampler))
    assert list(sampler) == third


def test_batches_refuse_what_cannot_fit() -> None:
    with pytest.raises(DataError, match="does not fit a batch"):
        DurationBatchSampler([3.0, 50.0], 40.0)
    with pytest.raises(DataError, match="no utterances"):
        DurationBatchSampler([], 40.0)


# --- commands ----------------------------------------------------------------------------------------


def test_commands_from_folder_to_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_corpus(tmp_path / "audio", "tr", utterances=8, speakers=4, synthesiser="tones")
    raw, checked = tmp_path / "raw.jsonl", tmp_path / "checked.jsonl"
    assert (
        command.main(["import", "folder", str(tmp_path / "audio"), "--language", "tr", "--out", str(raw)])
        == 0
    )
    assert command.main(["validate", str(raw), "--language", "tr", "--out", str(checked)]) == 0
    assert command.main(["split", str(checked), "--out", str(tmp_path)]) == 0
    assert (
        sum(len(read_manifest(tmp_path / f"{part}.jsonl")) for part in ("train", "validation", "test")) == 8
    )
    assert command.main(["split", str(tmp_path / "none.jsonl"), "--out", str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err


def test_synthetic_corpus_is_in_its_alphabet(corpus: Callable[[str], Path]) -> None:
    rows = read_manifest(corpus("az"))
    codec = CharacterCodec("".join(sorted({c for row in rows for c in row.text if c != " "})))
    kept, report = validate(rows, normalise=normaliser("az"), outside=codec.outside)
    assert len(kept) == 24
    assert report.dropped == []
