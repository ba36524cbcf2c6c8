"""A small made-up corpus to try a recipe with, by espeak-ng where it is installed, else of tones per letter.

    python -m training.data.synthetic --language ru --out FOLDER

For rehearsals and tests only: a model of these recordings understands a synthesiser, not people.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

WORDS: dict[str, str] = {
    "en": "one two three four five red green blue open close left right",
    "ru": "один два три ещё пять красный синий да нет вода лес дом",
    "vi": "một hai ba bốn năm đỏ xanh nước nhà người trời đất",
    "tr": "bir iki üç dört beş ılık ırmak kırmızı yeşil evet hayır su",
    "az": "bir iki üç dörd beş qırmızı yaşıl ağac həyat şəhər su ev",
}
SAMPLE_RATE_HZ = 16_000


def make_corpus(
    folder: Path,
    language: str,
    *,
    utterances: int = 24,
    speakers: int = 6,
    seed: int = 0,
    synthesiser: str = "auto",
) -> Path:
    """Write `folder`/speaker/NNN.wav with NNN.txt beside it; returns `folder`.

    Args:
        folder: where to; made if absent.
        language: one of WORDS.
        utterances: recordings in all, two to four words each.
        speakers: voices, which differ in pitch and pace.
        seed: of the choice of words.
        synthesiser: "auto", "espeak" or "tones".
    """
    random = np.random.default_rng(seed)
    words = WORDS[language].split()
    program = shutil.which("espeak-ng") if synthesiser != "tones" else None
    if synthesiser == "espeak" and program is None:
        raise FileNotFoundError("espeak-ng is not installed")
    for index in range(utterances):
        speaker = index % speakers
        text = " ".join(random.choice(words, int(random.integers(2, 5))))
        target = folder / f"speaker{speaker:02d}" / f"{index:03d}.wav"
        target.parent.mkdir(parents=True, exist_ok=True)
        samples = _espeak(program, language, text, speaker) if program else tones(text, speaker)
        soundfile.write(target, samples, SAMPLE_RATE_HZ)
        target.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    return folder


def _espeak(program: str, language: str, text: str, speaker: int) -> npt.NDArray[np.float32]:
    pitch, pace = 30 + 9 * speaker, 150 + 8 * (speaker % 5)
    command = [program, "-v", language, "-p", str(pitch), "-s", str(pace), "--stdout", text]
    answer = subprocess.run(command, capture_output=True, check=True, timeout=60)
    data = io.BytesIO(answer.stdout)
    samples, rate_hz = soundfile.read(data, dtype="float32")
    resampled: npt.NDArray[np.float32] = soxr.resample(samples, rate_hz, SAMPLE_RATE_HZ).astype(np.float32)
    return resampled


def tones(text: str, speaker: int = 0) -> npt.NDArray[np.float32]:
    """Each letter as 70 ms of its own pair of frequencies, a space as silence."""
    count = round(0.07 * SAMPLE_RATE_HZ)
    time_s = np.arange(count) / SAMPLE_RATE_HZ
    fade = np.minimum(1.0, np.minimum(np.arange(count), np.arange(count)[::-1]) / 80.0)
    parts = []
    for letter in f" {text} ":
        code = ord(letter) % 97
        low, high = 250 + 14 * code + 3 * speaker, 1500 + 41 * ((code * 31) % 97)
        tone = np.sin(2 * np.pi * low * time_s) + 0.7 * np.sin(2 * np.pi * high * time_s)
        parts.append(np.zeros(count) if letter == " " else 0.3 * fade * tone)
    return np.concatenate(parts).astype(np.float32)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--language", choices=sorted(WORDS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--utterances", type=int, default=24)
    parser.add_argument("--speakers", type=int, default=6)
    arguments = parser.parse_args()
    print(
        make_corpus(
            arguments.out, arguments.language, utterances=arguments.utterances, speakers=arguments.speakers
        )
    )


if __name__ == "__main__":
    main()
