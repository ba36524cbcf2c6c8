"""``asr models``: what is here, whether it is what it says, and how to get more."""

from __future__ import annotations

import sys
from pathlib import Path

from api.bundle import list_bundles, load_bundle, verify_bundle
from api.errors import BundleError
from api.settings import Settings


def list_models(settings: Settings) -> int:
    """Bundles in ASR_MODELS_DIR, then what the catalogue could pull."""
    from api.catalog import CATALOG

    names = list_bundles(settings.models_dir)
    print(f"{'name':<24} {'languages':<12} {'graphs':<16} {'MB':>6}  licence")
    for name in names:
        try:
            bundle = load_bundle(settings.models_dir, name)
        except BundleError as error:
            print(f"{name:<24} refused: {error.field}: {error.problem}")
            continue
        except OSError as error:
            print(f"{name:<24} refused: {error}")
            continue
        manifest = bundle.manifest
        size_mb = sum((bundle.path / file).stat().st_size for file in manifest.files) / 1e6
        languages, graphs = ",".join(manifest.languages), ",".join(sorted(manifest.graphs))
        print(f"{name:<24} {languages:<12} {graphs:<16} {size_mb:>6.1f}  {manifest.licence}")
    if not names:
        print(f"no bundles in {settings.models_dir}")
    print("\nin the catalogue (asr models pull NAME):")
    for entry in CATALOG.values():
        print(f"{entry.name:<24} {','.join(entry.languages):<12} {entry.title:<48} {entry.licence}")
    return 0


def verify_models(settings: Settings, names: list[str]) -> int:
    """Sha256 sums, manifest, vocabulary, and one run of each graph; 1 where one is refused."""
    names = names or list_bundles(settings.models_dir)
    if not names:
        print(f"asr: no bundles in {settings.models_dir}", file=sys.stderr)
        return 1
    refused = 0
    for name in names:
        try:
            bundle = verify_bundle(settings.models_dir, name)
        except Exception as error:  # no bundle keeps the others from being looked at
            refused += 1
            kind = "" if isinstance(error, BundleError) else f"{type(error).__name__}: "
            print(f"{name}: REFUSED: {kind}{error}")
        else:
            graphs = ", ".join(sorted(bundle.manifest.graphs))
            print(f"{name}: ok ({len(bundle.manifest.files)} files, {graphs})")
    return 1 if refused else 0


def pull_model(
    settings: Settings,
    name: str,
    calibration: Path | None = None,
    validation: Path | None = None,
    *,
    four_bits: bool = False,
) -> int:
    """Download, convert and verify a model of the catalogue; 1 with one line where that cannot be."""
    from api.pull import PullError, find_entry, pull

    try:
        bundle = pull(
            find_entry(name),
            settings.models_dir,
            calibration=calibration,
            validation=validation,
            four_bits=four_bits,
        )
    except (PullError, BundleError) as error:
        print(f"asr: {error}", file=sys.stderr)
        return 1
    print(f"{bundle.path}: ready; serve it with ASR_MODELS={name}")
    return 0
