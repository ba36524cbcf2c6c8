"""``asr models pull``: download what the catalogue pins, convert it in another process, verify the bundle.

Downloads stay in ``<models>/.downloads/<name>/`` until the bundle stands, so an interrupted pull goes on
where it stopped. ``<models>/.downloads/pins.json`` records commits and sha256 sums that the catalogue could
not know: a sum only once its file has become a bundle, because a login page arrives with status 200, too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from api.bundle import Bundle, sha256_of, verify_bundle
from api.catalog import CATALOG, Archive, CatalogEntry, HubFiles
from api.errors import BundleError

DOWNLOADS = ".downloads"
TIMEOUT_S = 30.0
EXTRA = "run `make setup` in the repository"

Say = Callable[[str], None]


class PullError(Exception):
    """A model could not be pulled; the message is one line that says what to do."""


def find_entry(name: str) -> CatalogEntry:
    """The catalogue's entry. Raises PullError naming those there are."""
    if name not in CATALOG:
        raise PullError(f"the catalogue has no model {name!r}; it has {', '.join(CATALOG)}")
    return CATALOG[name]


def pull(
    entry: CatalogEntry,
    models_dir: Path,
    *,
    calibration: Path | None = None,
    validation: Path | None = None,
    four_bits: bool = False,
    say: Say = print,
) -> Bundle:
    """Download, convert, verify. Raises PullError, BundleError.

    ``calibration``, ``validation``: manifests of recordings, for an INT8 graph or, with ``four_bits``, one
    with weights of four bits (see ``training.convert``).

    The converter's own output goes to standard output and error of this process.
    """
    if (models_dir / entry.name).exists():
        raise PullError(f"{models_dir / entry.name} is already there; delete it to pull the model again")
    if entry.needs_recordings and calibration is None:
        raise PullError(
            f"{entry.name} has too many weights for float32: name recordings with texts (--calibration), on "
            "which its INT8 graph is found and accepted"
        )
    if four_bits and calibration is None:
        raise PullError("--four-bits needs recordings (--calibration), on which the rounding is found")
    for manifest in (calibration, validation):
        if manifest is not None and not manifest.is_file():
            raise PullError(f"{manifest}: no such manifest")
    for module in ("training", "torch"):
        if importlib.util.find_spec(module) is None:
            raise PullError(f"converting {entry.name} needs {module}: {EXTRA}")
    folder = models_dir / DOWNLOADS / entry.name
    found: dict[Archive, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pins = Pins(models_dir / DOWNLOADS / "pins.json")
        for source in entry.sources:
            if isinstance(source, Archive):
                found[source] = _fetch_archive(source, folder, pins, say)
            else:
                _fetch_hub(source, folder, pins, say)
    except OSError as error:
        raise PullError(f"cannot write to {folder}: {error.strerror or error}") from error
    recordings = {"--calibration": calibration, "--validation": validation}
    options = [text for name, path in recordings.items() if path for text in (name, str(path))]
    options += ["--four-bits"] * four_bits
    unknown = [source for source in found if (source.sha256 or pins.get(source.url)) is None]
    try:
        _convert(entry, folder, models_dir, _revision(entry, pins, found), options, say)
        bundle = verify_bundle(models_dir, entry.name)
    except (PullError, BundleError):
        for source in unknown:
            (folder / source.file).unlink(missing_ok=True)
            say(f"{source.file}: deleted, because its sha256 is not known and it may be something else")
        raise
    for source in unknown:
        pins.record(source.url, found[source])
        say(f"{source.file}: sha256 {found[source]}, recorded in {pins.path} for later pulls")
    shutil.rmtree(folder)
    return bundle


class Pins:
    """What the first pull found: commits by repository, sha256 by address."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._values: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self._values = {}
        except ValueError as error:
            raise PullError(f"{path} is damaged ({error}); delete it to record the pins anew") from error

    def get(self, key: str) -> str | None:
        """The recorded value."""
        return self._values.get(key)

    def record(self, key: str, value: str) -> None:
        """Write a value, atomically."""
        self._values[key] = value
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self._values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(self.path)


def _fetch_hub(source: HubFiles, folder: Path, pins: Pins, say: Say) -> None:
    """Files of one commit through ``huggingface_hub``, which resumes, and checks sizes and hashes."""
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        # The hub's client tries five times, half a minute in all, before it says that there is no network.
        httpx.head(constants.ENDPOINT, timeout=TIMEOUT_S)
        revision = source.revision or pins.get(source.repository)
        if revision is None:
            revision = str(HfApi().model_info(source.repository, timeout=TIMEOUT_S).sha)
            pins.record(source.repository, revision)
            say(f"{source.repository}: commit {revision}, recorded for later pulls")
        for file in (*source.files, *source.optional):
            say(f"{source.repository}@{revision[:12]}: {file}")
            try:
                hf_hub_download(
                    source.repository, file, revision=revision, local_dir=folder, etag_timeout=TIMEOUT_S
                )
            except EntryNotFoundError:
                if file not in source.optional:
                    raise
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, ValueError) as error:
        raise PullError(_network_line(constants.ENDPOINT, source.repository, error)) from error


def _fetch_archive(source: Archive, folder: Path, pins: Pins, say: Say) -> str:
    """One file over HTTPS: resumed by range, its length and sha256 checked. Returns the sha256."""
    target = folder / source.file
    partial = folder / f"{source.file}.partial"
    say(source.url)
    if not target.is_file():
        try:
            _stream(source.url, partial)
        except httpx.HTTPError as error:
            raise PullError(_network_line(source.url, source.file, error)) from error
        partial.replace(target)
    actual, recorded = sha256_of(target), pins.get(source.url)
    expected = source.sha256 or recorded
    if expected is not None and actual != expected:
        target.unlink()
        where = "" if source.sha256 else f" (recorded in {pins.path} by an earlier pull)"
        raise PullError(
            f"{source.file}: sha256 {actual}, expected {expected}{where}; deleted the file, pull again"
        )
    return actual


def _stream(url: str, partial: Path) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            partial.unlink()
            return _stream(url, partial)
        response.raise_for_status()
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        length = int(response.headers.get("content-length", -1))
        total = -1 if length < 0 else length + (have if resumed else 0)
        with partial.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_raw():
                file.write(chunk)
    size = partial.stat().st_size
    if total not in (-1, size):
        raise httpx.RemoteProtocolError(f"{size} of {total} bytes arrived; pull again to go on from there")
    return None


def _revision(entry: CatalogEntry, pins: Pins, found: dict[Archive, str]) -> str | None:
    """What the manifest says the weights were: the archive's sha256, or the repository's commit."""
    first = entry.sources[0]
    return found[first] if isinstance(first, Archive) else first.revision or pins.get(first.repository)


def _convert(
    entry: CatalogEntry, folder: Path, models_dir: Path, revision: str | None, options: list[str], say: Say
) -> None:
    command = [sys.executable, "-m", "training.convert", entry.family, str(folder / entry.weights)]
    command += ["--name", entry.name, "--models-dir", str(models_dir), "--language", *entry.languages]
    command += ["--title", entry.title, "--licence", entry.licence, "--url", entry.page]
    command += ["--revision", str(revision), *options]
    say(f"converting {entry.name}")
    environment: dict[str, Any] = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    finished = subprocess.run(command, check=False, env=environment)
    if finished.returncode != 0:
        raise PullError(f"the converter failed; its message is above, downloads are in {folder}")


def _network_line(address: str, what: str, error: Exception) -> str:
    """One line for a person: which host, what went wrong, and that there is another way."""
    host = urlsplit(address).netloc or address
    if isinstance(error, httpx.HTTPStatusError) or getattr(error, "response", None) is not None:
        status = error.response.status_code  # type: ignore[attr-defined]
        return f"{what}: {host} answered {status}; is the name still right, and is access granted?"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{what}: cannot be fetched from {host} ({reason}); check the network, or copy a bundle into place"
