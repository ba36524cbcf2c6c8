"""The `asr` command as a process: output, exit codes, one clear line per problem."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from api.bundle import Bundle, verify_bundle
from api.commands.models import verify_models
from api.settings import Settings
from loadtest.processes import ROOT
from tests.e2e.live import environment
from tests.tiny_bundle import make_bundle, recite, sing, wav


def asr(models_dir: Path, *arguments: str | Path, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "api.cli", *map(str, arguments)],
        env=environment(models_dir, **settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    contents = {
        "one.wav": wav(sing("abc de")),
        "long.wav": wav(recite(["head bad", "cafe"] * 5, 1.0)),
        "bad.wav": b"this is no audio",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    return {name: tmp_path / name for name in contents}


def test_one_file_to_text(models_dir: Path, files: dict[str, Path]) -> None:
    result = asr(models_dir, "transcribe", files["one.wav"])
    assert (result.returncode, result.stdout, result.stderr) == (0, "abc de\n", "")


def test_output_that_cannot_be_written_is_one_line(models_dir: Path, files: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "api.cli", "transcribe", str(files["one.wav"])]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            command,
            env=environment(models_dir),
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert result.returncode != 0
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_whose_name_is_no_text_is_transcribed(
    models_dir: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav")
    Path(odd).write_bytes(files["one.wav"].read_bytes())
    command = [sys.executable, "-m", "api.cli", "transcribe", odd, str(files["one.wav"])]
    strict = environment(models_dir) | {"PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run(command, env=strict, cwd=ROOT, capture_output=True, timeout=120)
    assert (result.returncode, result.stdout.count(b"abc de")) == (0, 2), result.stderr


def test_srt_and_json(models_dir: Path, files: dict[str, Path]) -> None:
    srt = asr(models_dir, "transcribe", files["long.wav"], "--format", "srt")
    assert srt.returncode == 0
    assert srt.stdout.startswith("1\n00:00:00,1")
    assert srt.stdout.count(" --> ") == 10
    body = json.loads(asr(models_dir, "transcribe", files["long.wav"], "--format", "json").stdout)
    assert body["text"] == "head bad cafe " * 4 + "head bad cafe"
    assert len(body["words"]) == 15


@pytest.mark.parametrize("output_format", ["srt", "vtt"])
def test_subtitles_of_many_files_are_not_run_together(
    models_dir: Path, files: dict[str, Path], output_format: str
) -> None:
    result = asr(models_dir, "transcribe", files["one.wav"], files["long.wav"], "--format", output_format)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"--format {output_format}: 2 files would run together" in result.stderr


def test_json_of_many_files_is_a_line_for_each(models_dir: Path, files: dict[str, Path]) -> None:
    order = [files["long.wav"], files["bad.wav"], files["one.wav"]]
    result = asr(models_dir, "transcribe", *order, "--format", "json")
    assert result.returncode == 1
    bodies = [json.loads(line) for line in result.stdout.splitlines()]
    assert [body["file"] for body in bodies] == [str(path) for path in order]
    assert "not audio that can be read" in bodies[1]["error"]
    assert (bodies[2]["text"], len(bodies[2]["words"])) == ("abc de", 2)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("cat one.wav | {asr} transcribe -", "abc de\n"),
        ("{asr} transcribe - <one.wav", "abc de\n"),
        ("cat long.wav | {asr} transcribe /dev/stdin", "head bad cafe " * 4 + "head bad cafe\n"),
        ("mkfifo a b; cat one.wav >b & cat one.wav >a & {asr} transcribe a b", "a: abc de\nb: abc de\n"),
    ],
)
def test_pipes_are_transcribed(
    models_dir: Path, files: dict[str, Path], tmp_path: Path, command: str, said: str
) -> None:
    result = subprocess.run(
        command.format(asr=f"{sys.executable} -m api.cli"),
        shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env=environment(models_dir) | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, said, "")


def test_a_pipe_without_end_is_given_up(models_dir: Path) -> None:
    result = asr(models_dir, "transcribe", "/dev/zero", max_audio_s=1)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "asr: /dev/zero: more than 384000 bytes, too many for ASR_MAX_AUDIO_S\n"


def test_many_files_keep_their_order_and_one_failure_is_status_one(
    models_dir: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    order = [files["long.wav"], files["bad.wav"], tmp_path / "none.wav", files["one.wav"]]
    result = asr(models_dir, "transcribe", *order)
    assert result.returncode == 1
    assert [line.split(": ")[0] for line in result.stdout.splitlines()] == [str(order[0]), str(order[3])]
    assert result.stdout.endswith("abc de\n")
    errors = result.stderr.splitlines()
    assert len(errors) == 2
    assert "not audio that can be read" in errors[0]
    assert "No such file" in errors[1]


def test_output_folder(models_dir: Path, files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["transcribe", files["one.wav"], files["long.wav"], "--format", "vtt", "--output", out]
    result = asr(models_dir, *arguments)
    assert (result.returncode, result.stdout) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == ["long.wav.vtt", "one.wav.vtt"]
    assert (out / "one.wav.vtt").read_text().startswith("WEBVTT")


def test_a_transcript_that_cannot_be_written_costs_no_other(
    models_dir: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "one.wav.txt").mkdir(parents=True)  # a folder where the file would go
    result = asr(models_dir, "transcribe", files["one.wav"], files["long.wav"], "--output", out)
    assert result.returncode == 1
    assert result.stderr == f"asr: {files['one.wav']}: {out / 'one.wav.txt'}: Is a directory\n"
    assert (out / "long.wav.txt").read_text().startswith("head bad")


def test_language_is_case_blind_as_over_http(models_dir: Path, files: dict[str, Path]) -> None:
    result = asr(models_dir, "transcribe", files["one.wav"], "--language", "EN")
    assert (result.returncode, result.stdout) == (0, "abc de\n")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["transcribe", "x.wav", "--model", "nothing"], 1, "no manifest.json there"),
        (["transcribe", "x.wav", "--language", "vi"], 1, "does not transcribe language 'vi'"),
        (["transcribe", "x.wav", "--beam", "9999"], 2, "--beam 9999"),
        (["transcribe", "x.wav", "--beam", "0", "--hotword", "cafe"], 2, "has no use for --hotword"),
        (["transcribe", "x.wav", "--output", "/nowhere/at/all"], 2, "is not a folder"),
        (["transcribe", "a/x.wav", "b/x.wav", "--output", "."], 2, "2 of the files are named 'x.wav'"),
        (["bench", "--clips", "0"], 2, "--clips 0: must be 1 or more"),
        (["bench", "--seconds", "0"], 2, "--seconds 0: must be above 0"),
        (["bench", "--seconds", "nan"], 2, "--seconds nan: must be above 0"),
        (["bench", "--seconds", "1e9"], 2, "at most 600"),
    ],
)
def test_mistakes_are_one_line(models_dir: Path, arguments: list[str], status: int, words: str) -> None:
    result = asr(models_dir, *arguments)
    assert result.returncode == status
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_usage_errors_are_status_two(models_dir: Path) -> None:
    assert asr(models_dir, "transcribe").returncode == 2
    assert asr(models_dir, "sing").returncode == 2
    assert asr(models_dir).returncode == 2


def test_models_list_and_verify(tmp_path: Path) -> None:
    make_bundle(tmp_path, "tiny")
    broken = make_bundle(tmp_path, "broken")
    (broken / "vocab.txt").write_text("changed\n")
    listed = asr(tmp_path, "models", "list")
    assert listed.returncode == 0
    assert "tiny" in listed.stdout
    assert "broken" in listed.stdout
    assert "refused" in listed.stdout
    assert asr(tmp_path, "models", "verify", "tiny").returncode == 0
    verified = asr(tmp_path, "models", "verify")
    assert verified.returncode == 1
    assert "tiny: ok" in verified.stdout
    assert "broken: REFUSED" in verified.stdout
    assert "sha256" in verified.stdout


def test_what_nobody_foresaw_in_a_bundle_does_not_end_the_verification_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(_: Path, name: str) -> Bundle:
        if name == "first":
            raise MemoryError("7 TiB")
        return verify_bundle(tmp_path, name)

    make_bundle(tmp_path, "second")
    monkeypatch.setattr("api.commands.models.verify_bundle", verify)
    assert verify_models(Settings(models_dir=tmp_path), ["first", "second"]) == 1
    assert capsys.readouterr().out.startswith("first: REFUSED: MemoryError: 7 TiB\nsecond: ok")


def test_bench_ends_with_json(models_dir: Path) -> None:
    result = asr(models_dir, "bench", "--seconds", "1", "--clips", "8")
    assert result.returncode == 0
    report = json.loads(result.stdout.splitlines()[-1])
    assert [row["in_flight"] for row in report["rows"]] == [1, 8, 32]
    assert all(row["audio_s_per_s"] > 0 for row in report["rows"])


def test_env_example_is_the_committed_one(models_dir: Path) -> None:
    result = asr(models_dir, "settings", "--env-example")
    assert (ROOT / ".env.example").read_text().startswith(result.stdout)
