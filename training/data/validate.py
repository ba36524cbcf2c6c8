"""Look at every recording and text once; keep what can be trained on and say what was dropped and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from training.data.audio import UndecodableAudioError, load_waveform
from training.data.length import stated_s
from training.data.manifest import Utterance
from training.errors import EmptyManifestError

REASONS = {
    "missing_file": "the recording does not exist",
    "undecodable": "the bytes are not audio",
    "truncated": "the recording ends well before its header says",
    "silent": "no sample is louder than the threshold",
    "too_short": "shorter than min_duration_s",
    "too_long": "longer than max_duration_s",
    "empty_text": "nothing is left of the text after normalisation",
    "outside_vocabulary": "the text has characters that the vocabulary has not",
    "no_tokens": "the tokenizer makes nothing of the text",
    "text_too_long": "more tokens than the model has output frames",
}

MOSTLY = 0.98
"""Share of the stated length that a whole recording has at least."""


@dataclass(frozen=True)
class Limits:
    """What counts as usable."""

    sample_rate_hz: int = 16_000
    min_duration_s: float = 0.3
    max_duration_s: float = 30.0
    silence_peak: float = 1e-3
    """Largest absolute sample of a recording that counts as silent (-60 dB of full scale)."""


@dataclass
class Report:
    """What validation found; `dropped` has one entry per utterance that is left out."""

    kept: int = 0
    kept_s: float = 0.0
    dropped: list[dict[str, str]] = field(default_factory=list)
    outside: Counter[str] = field(default_factory=Counter)

    @property
    def reasons(self) -> dict[str, int]:
        """Dropped utterances per reason, most frequent first."""
        return dict(Counter(entry["reason"] for entry in self.dropped).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "kept": self.kept,
            "kept_hours": round(self.kept_s / 3600, 4),
            "dropped": len(self.dropped),
            "reasons": {
                name: {"count": count, "means": REASONS[name]} for name, count in self.reasons.items()
            },
            "characters_outside_vocabulary": dict(self.outside.most_common()),
            "utterances": self.dropped,
        }

    def summary(self) -> str:
        """One line for people."""
        reasons = ", ".join(f"{count} {name}" for name, count in self.reasons.items()) or "none"
        line = f"kept {self.kept} utterances ({self.kept_s / 3600:.2f} h), "
        line += f"dropped {len(self.dropped)}: {reasons}"
        if self.outside:
            shown = " ".join(f"{character!r}x{count}" for character, count in self.outside.most_common(10))
            line += f"; characters outside the vocabulary: {shown}"
        return line

    def write(self, path: Path) -> None:
        """Store as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def validate(
    rows: Iterable[Utterance],
    *,
    normalise: Callable[[str], str],
    outside: Callable[[str], list[str]],
    frames_needed: Callable[[str], int] | None = None,
    frames_of: Callable[[int], int] | None = None,
    limits: Limits | None = None,
    threads: int = 2,
    report_to: Path | None = None,
) -> tuple[list[Utterance], Report]:
    """Rows that can be trained on, with normalised texts and measured durations, and the report.

    Args:
        rows: what to look at.
        normalise: the text normaliser.
        outside: characters of a normalised text that the vocabulary has not.
        frames_needed: fewest output frames that spell a text (CTC); None skips that check.
        frames_of: output frames of a number of samples, needed with `frames_needed`.
        limits: durations and silence.
        threads: recordings decoded at once.
        report_to: where to write the report, also when nothing is left.

    Raises EmptyManifestError when nothing is left.
    """
    limits = limits or Limits()
    rows = list(rows)
    report = Report()
    kept: list[Utterance] = []

    def look(row: Utterance) -> tuple[Utterance, str, str]:
        text = normalise(row.text)
        if not text:
            return row, "empty_text", repr(row.text)
        if unknown := outside(text):
            return replace(row, text=text), "outside_vocabulary", "".join(unknown)
        reason, detail, samples = _look_at_audio(row, limits)
        checked = replace(row, text=text, duration_s=samples / limits.sample_rate_hz)
        if not reason and frames_needed is not None and frames_of is not None:
            needed, there = frames_needed(text), frames_of(samples)
            if needed < 1:
                return checked, "no_tokens", repr(text)
            if needed > there:
                return checked, "text_too_long", f"{needed} tokens in {there} frames"
        return checked, reason, detail

    with ThreadPoolExecutor(threads) as pool:
        looked = pool.map(look, rows)
        for row, reason, detail in tqdm(looked, total=len(rows), desc="validate", unit="clip", mininterval=1):
            if reason:
                report.dropped.append({"audio_filepath": str(row.audio), "reason": reason, "detail": detail})
                if reason == "outside_vocabulary":
                    report.outside.update(detail)
            else:
                kept.append(row)
                report.kept += 1
                report.kept_s += row.duration_s or 0.0
    if report_to is not None:
        report.write(report_to)
    if not kept:
        first = report.dropped[0]
        why = f"{first['audio_filepath']}: {REASONS[first['reason']]} {first['detail']}".rstrip()
        raise EmptyManifestError(
            f"no utterance is left of {len(rows)}: {report.summary()}; the first is {why}"
        )
    return kept, report


def _look_at_audio(row: Utterance, limits: Limits) -> tuple[str, str, int]:
    """Reason and detail (empty when fine) and the number of samples."""
    try:
        samples = load_waveform(row.audio, limits.sample_rate_hz, row.offset_s, row.duration_s)
    except FileNotFoundError:
        return "missing_file", "", 0
    except (UndecodableAudioError, OSError, ValueError) as error:
        return "undecodable", str(error), 0
    duration_s = len(samples) / limits.sample_rate_hz
    if not np.isfinite(samples).all():
        return "undecodable", "samples are not finite", len(samples)
    if (stated := _stated_s(row)) is not None and duration_s < MOSTLY * stated:
        return "truncated", f"{duration_s:.2f} s of {stated:.2f} s", len(samples)
    if duration_s < limits.min_duration_s:
        return "too_short", f"{duration_s:.2f} s", len(samples)
    if duration_s > limits.max_duration_s:
        return "too_long", f"{duration_s:.2f} s", len(samples)
    if float(np.abs(samples).max()) < limits.silence_peak:
        return "silent", f"peak {np.abs(samples).max():.1e}", len(samples)
    return "", "", len(samples)


def _stated_s(row: Utterance) -> float | None:
    """What a row should have of its recording, by the recording's header."""
    whole_s = stated_s(row.audio)
    if whole_s is None:
        return None
    rest_s = max(0.0, whole_s - row.offset_s)
    return min(rest_s, row.duration_s) if row.duration_s and row.duration_s > 0 else rest_s
