"""Train, validation and test parts that share no speaker, the same ones for the same seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.data.manifest import Utterance
from training.errors import SplitError

TOO_LARGE = 2.0
"""A speaker with more than so many times a held-out part's seconds is passed over for it."""
LITTLE = 0.75
"""Share of its fraction below which the training part is small enough to warn of."""


@dataclass(frozen=True)
class Split:
    """Rows per part, in the manifest's order."""

    train: list[Utterance]
    validation: list[Utterance]
    test: list[Utterance]

    def parts(self) -> dict[str, list[Utterance]]:
        """Part name -> rows."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def speaker_of(row: Utterance) -> str:
    """Who speaks; a recording of an unknown speaker counts as a speaker of its own."""
    return f"speaker:{row.source}:{row.speaker}" if row.speaker else f"recording:{row.audio.name}"


def told_apart_by(parts: Mapping[str, Sequence[Utterance]]) -> str:
    """What no two parts share: "speaker" where every row names its own, else "recording"."""
    named = all(row.speaker for rows in parts.values() for row in rows)
    return "speaker" if named else "recording"


def split_by_speaker(
    rows: Sequence[Utterance], fractions: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0
) -> Split:
    """Divide `rows` by speaker so that the parts come near `fractions` of the total duration.

    Speakers are ordered by a hash of seed and name, so neither the order of the rows nor other speakers'
    recordings move a speaker from one half of the order to the other; the test part is filled first, then
    validation. For both, a speaker of more than TOO_LARGE times the part is passed over as long as there are
    clearly smaller ones. Every part with a fraction above zero gets at least one speaker. Raises SplitError.
    """
    if any(fraction < 0 for fraction in fractions) or abs(sum(fractions) - 1.0) > 1e-6 or fractions[0] <= 0:
        raise SplitError(
            f"fractions {fractions} must not be negative, must add up to 1, and train needs a part"
        )
    total_s: dict[str, float] = {}
    for row in rows:
        name = speaker_of(row)
        total_s[name] = total_s.get(name, 0.0) + (row.duration_s or 1.0)
    wanted = sum(fraction > 0 for fraction in fractions)
    if len(total_s) < wanted:
        raise SplitError(
            f"{wanted} parts that share no speaker need at least {wanted} speakers, the data has "
            f"{len(total_s)} ({len(rows)} utterances); add recordings of other speakers, or leave `speaker` "
            "out of the manifest: each recording then counts as a speaker of its own"
        )
    order = sorted(total_s, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    everything_s = sum(total_s.values())
    part_of: dict[str, str] = {}
    remaining = list(order)
    held_out = [
        (name, part) for name, part in (("test", fractions[2]), ("validation", fractions[1])) if part > 0
    ]
    for later, (name, fraction) in zip(range(len(held_out), 0, -1), held_out, strict=True):
        filled_s = 0.0
        wanted_s = fraction * everything_s
        while len(remaining) > later and filled_s < wanted_s:
            # of speakers that are all too large, those about as small as the smallest stay in their order
            largest_s = max(TOO_LARGE * wanted_s, 1.5 * min(total_s[speaker] for speaker in remaining))
            speaker = next(speaker for speaker in remaining if total_s[speaker] <= largest_s)
            if filled_s and filled_s + total_s[speaker] / 2 > wanted_s:
                break
            remaining.remove(speaker)
            part_of[speaker] = name
            filled_s += total_s[speaker]
    parts: dict[str, list[Utterance]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        parts[part_of.get(speaker_of(row), "train")].append(row)
    return Split(parts["train"], parts["validation"], parts["test"])


def little_to_train_on(split: Split, fractions: tuple[float, float, float]) -> str:
    """What to say where the training part is far smaller than `fractions` asks for; empty where it is not."""
    seconds = {part: sum(row.duration_s or 1.0 for row in rows) for part, rows in split.parts().items()}
    share = seconds["train"] / (sum(seconds.values()) or 1.0)
    if share >= LITTLE * fractions[0]:
        return ""
    return (
        f"warning: train has {share:.0%} of the data, fractions ask for {fractions[0]:.0%}: the speakers are "
        "too few, or too unequal, for parts that share none; add recordings of other speakers, or leave "
        "`speaker` out of the manifest: each recording then counts as a speaker of its own"
    )
