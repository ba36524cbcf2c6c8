"""Stage 1: look at the data, drop what cannot be used, split by speaker."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

from api.bundle import sha256_of
from training.config import DataSettings
from training.data.manifest import Utterance, read_manifest, spread, write_manifest
from training.data.split import Split, little_to_train_on, speaker_of, split_by_speaker
from training.data.validate import Limits, validate
from training.errors import SplitError
from training.loop.plots import plot_distributions
from training.loop.run_folder import PARTS, SOURCES, RunFolder
from training.stages.recipe import Facts, Recipe
from training.vocabulary import TokenCodec


def prepare(recipe: Recipe, folder: RunFolder) -> dict[str, list[Utterance]]:
    """Write `data/{train,validation,test}.jsonl` and `data/report_*.json`; done already: read them.

    Manifests that changed since then are prepared again, as long as nothing was learned.

    Raises ManifestError, EmptyManifestError, SplitError.
    """
    files = {part: folder.manifests / f"{part}.jsonl" for part in PARTS}
    sources = _sources(recipe.config.data)
    if _changed(sources, folder):
        if folder.has_learned:
            print(
                f"{folder.path}: the manifests have changed; what was learned belongs to the old data, which "
                "goes on being used; give another --run folder to train on the new"
            )
        else:
            folder.forget_parts()
    if all(path.is_file() for path in files.values()):
        # a part whose fraction is 0 is an empty file
        return {part: read_manifest(path) if path.stat().st_size else [] for part, path in files.items()}
    settings = recipe.config.data
    codec = recipe.codec()
    if settings.manifest is not None:
        kept = _validated(recipe, codec, settings.manifest, folder, "all")
        split = split_by_speaker(kept, settings.fractions, settings.seed)
        if warning := little_to_train_on(split, settings.fractions):
            print(warning, file=sys.stderr)
    else:
        given = {part: path for part in PARTS if (path := getattr(settings, part)) is not None}
        split = Split(**{part: _validated(recipe, codec, path, folder, part) for part, path in given.items()})
        _disjoint(split)
    rows = split.parts()
    everything = [row for part in rows.values() for row in part]
    plot_distributions(
        [row.duration_s or 0.0 for row in everything], [row.text for row in everything], folder.plots
    )
    folder.write_json("split.json", {part: _summary(part_rows) for part, part_rows in rows.items()})
    folder.write_json(SOURCES, sources)
    for part, path in files.items():
        write_manifest(path, rows[part])
    return rows


def _sources(settings: DataSettings) -> dict[str, str]:
    """SHA-256 of the manifests that the configuration names and that are there."""
    named = {name: getattr(settings, name) for name in ("manifest", *PARTS)}
    return {name: sha256_of(path) for name, path in named.items() if path is not None and path.is_file()}


def _changed(sources: dict[str, str], folder: RunFolder) -> bool:
    """Whether a manifest is another one than was prepared; one that is gone leaves what was made of it."""
    prepared = folder.read_json(SOURCES) or {}
    return any(prepared.get(name, digest) != digest for name, digest in sources.items())


def _validated(
    recipe: Recipe, codec: TokenCodec, manifest: Path, folder: RunFolder, name: str
) -> list[Utterance]:
    settings = recipe.config.data
    rows = read_manifest(manifest)
    if settings.limit is not None:
        rows = spread(rows, settings.limit)  # manifests are often in the order of their speakers
    facts = recipe.facts()
    kept, report = validate(
        rows,
        normalise=recipe.normaliser(),
        outside=codec.outside,
        frames_needed=lambda text: recipe.room_needed(codec.encode(text)),
        frames_of=recipe.room,
        limits=_limits(settings, facts),
        report_to=folder.manifests / f"report_{name}.json",
    )
    print(report.summary())
    return kept


def _limits(settings: DataSettings, facts: Facts) -> Limits:
    return Limits(
        sample_rate_hz=facts.sample_rate_hz,
        min_duration_s=settings.min_duration_s,
        max_duration_s=min(settings.max_duration_s, facts.longest_s or math.inf),
    )


def _disjoint(split: Split) -> None:
    for (one, first), (other, second) in itertools.combinations(split.parts().items(), 2):
        for what, found in (("speakers", _speakers), ("recordings", _recordings)):
            if shared := found(first) & found(second):
                raise SplitError(
                    f"{len(shared)} {what} are in {one} and in {other}, for example {min(shared)}"
                )


def _speakers(rows: list[Utterance]) -> set[str]:
    return {speaker_of(row) for row in rows if row.speaker}


def _recordings(rows: list[Utterance]) -> set[str]:
    """Not every row names its speaker, and stretches of one recording have one."""
    return {str(row.audio.resolve()) for row in rows}


def _summary(rows: list[Utterance]) -> dict[str, float]:
    return {
        "utterances": len(rows),
        "speakers": len(_speakers(rows)),
        "hours": round(sum(row.duration_s or 0.0 for row in rows) / 3600, 4),
    }
