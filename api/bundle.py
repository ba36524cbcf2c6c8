"""A model folder, verified: manifest, sha256 of every file, vocabulary, and what the graph says of itself.

    models/<name>/
      manifest.json       see api/manifest.py; unknown fields are refused
      model.int8.onnx     and/or model.onnx; which one loads is a setting, the manifest names the default
      vocab.txt           one token per line (see api/vocabulary.py)
      ngram.npz           optional: a language model for the beam search (see api/ngram.py)
      README.md           the model card

A bundle is data from outside. Names cannot leave the models folder, nothing loads before its sha256 was
checked, and a manifest that lies is refused with BundleError, which names bundle, field, value and what was
expected.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
from pydantic import ValidationError

from api.errors import BundleError
from api.kernels import PLACES, ROWS, Kernels
from api.manifest import GraphChoice, GraphName, Manifest
from api.ngram import NgramModel, load_table, weigh
from api.vocabulary import Vocabulary, WordSpan

__all__ = [
    "Bundle",
    "BundleError",
    "GraphName",
    "Manifest",
    "Vocabulary",
    "WordSpan",
    "check_outputs",
    "check_session",
    "list_bundles",
    "load_bundle",
    "sha256_of",
    "verify_bundle",
]

MANIFEST_FILE: Final = "manifest.json"
MAX_MANIFEST_BYTES: Final = 1_000_000
MAX_VOCABULARY_BYTES: Final = 20_000_000
MAX_LANGUAGE_MODEL_BYTES: Final = 500_000_000
_UNLISTED_FILES: Final = frozenset({MANIFEST_FILE, "README.md", "LICENSE"})


@dataclass(frozen=True)
class Bundle:
    """A model folder whose files are what its manifest says."""

    path: Path
    manifest: Manifest
    vocabulary: Vocabulary
    guide: NgramModel | None = None
    """The language model for the beam search, where there is one."""

    @property
    def name(self) -> str:
        """The folder's name, which is the manifest's."""
        return self.manifest.name

    @property
    def default_beam(self) -> int:
        """Width of the beam search where nobody asks for one: the language model's, else 0 for greedy."""
        entry = self.manifest.language_model
        return entry.beam if entry is not None else 0

    def choose_graph(self, wanted: GraphChoice = "auto", kernels: Kernels = "onnxruntime") -> GraphName:
        """The graph to load. Raises BundleError where it is not there.

        `auto` is the manifest's default, or what the manifest has for processors whose `kernels` are AVX2's.
        """
        if wanted == "auto":
            other = self.manifest.graph_without_vnni if kernels == "avx2" else None
            return other or self.manifest.default_graph
        if wanted not in self.manifest.graphs:
            have = ", ".join(sorted(self.manifest.graphs))
            raise BundleError(
                self.name, "graphs", wanted, f"the bundle has no such graph; expected one of {have}"
            )
        return wanted

    def graph_path(self, wanted: GraphChoice = "auto") -> Path:
        """Where the chosen graph lies."""
        return self.path / self.manifest.graphs[self.choose_graph(wanted)].file


def list_bundles(models_dir: Path) -> list[str]:
    """Names of the folders in `models_dir` that hold a manifest, sorted; nothing is verified."""
    if not models_dir.is_dir():
        return []
    return sorted(entry.name for entry in models_dir.iterdir() if (entry / MANIFEST_FILE).is_file())


def load_bundle(models_dir: Path, name: str) -> Bundle:
    """Verify `models_dir/name` and read its vocabulary.

    Raises BundleError naming the bundle, the field, its value and what was expected.
    """
    folder = _folder(models_dir, name)
    manifest = _manifest(folder, name)
    _check_names(folder, manifest)
    for file, expected in manifest.files.items():
        actual = sha256_of(folder / file)
        if actual != expected:
            problem = f"expected sha256 {expected}, the file has {actual}"
            raise BundleError(name, f"files[{file!r}]", expected, problem)
    _check_external_data(folder, manifest)
    vocabulary = _vocabulary(folder, manifest)
    return Bundle(folder, manifest, vocabulary, _guide(folder, manifest, vocabulary))


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plain(name: str) -> bool:
    """A name that stays in its folder whatever the platform."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\:\0\n") and ".." not in name


def _folder(models_dir: Path, name: str) -> Path:
    if not _plain(name):
        raise BundleError(name, "name", name, "expected a plain folder name without separators or '..'")
    folder = models_dir / name
    if not (folder / MANIFEST_FILE).is_file():
        have = ", ".join(list_bundles(models_dir)) or "none"
        raise BundleError(
            name, "path", str(folder), f"no {MANIFEST_FILE} there; bundles in the folder: {have}"
        )
    if folder.resolve().parent != models_dir.resolve():
        raise BundleError(name, "path", str(folder), "leaves the models folder through a link")
    return folder


def _manifest(folder: Path, name: str) -> Manifest:
    path = folder / MANIFEST_FILE
    _check_inside(folder, name, MANIFEST_FILE)
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(
            name, MANIFEST_FILE, path.stat().st_size, f"expected at most {MAX_MANIFEST_BYTES} bytes"
        )
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or MANIFEST_FILE
        value = first["input"] if len(repr(first["input"])) <= 100 else repr(first["input"])[:100] + "..."
        raise BundleError(name, field, value, first["msg"]) from error
    if manifest.name != name:
        raise BundleError(name, "name", manifest.name, f"expected {name!r}, the folder's name")
    least, most = manifest.input.min_samples, int(manifest.max_window_s * manifest.sample_rate_hz)
    if least > most:
        raise BundleError(name, "input.min_samples", least, f"expected at most {most}, as max_window_s")
    return manifest


def _check_inside(folder: Path, name: str, file: str) -> None:
    path = folder / file
    if path.resolve().parent != folder.resolve():
        raise BundleError(name, f"files[{file!r}]", file, "leaves the bundle's folder through a link")


def _check_names(folder: Path, manifest: Manifest) -> None:
    """Every name is plain, listed, and there; nothing lies in the folder that nobody vouches for."""
    name = manifest.name
    for file in manifest.files:
        if not _plain(file):
            raise BundleError(name, "files", file, "expected a plain file name without separators or '..'")
        if not (folder / file).is_file():
            raise BundleError(name, f"files[{file!r}]", file, "the file is missing")
        _check_inside(folder, name, file)
    named = {f"graphs.{graph}.file": entry.file for graph, entry in manifest.graphs.items()}
    named["vocabulary.file"] = manifest.vocabulary.file
    if manifest.language_model is not None:
        named["language_model.file"] = manifest.language_model.file
    for field, file in named.items():
        if file not in manifest.files:
            raise BundleError(name, field, file, "expected a name that `files` lists with its sha256")
    for field in ("default_graph", "graph_without_vnni"):
        if (graph := getattr(manifest, field)) is not None and graph not in manifest.graphs:
            have = ", ".join(sorted(manifest.graphs))
            raise BundleError(name, field, graph, f"expected one of {have}")
    for entry in sorted(folder.iterdir()):
        unknown = entry.name not in manifest.files and entry.name not in _UNLISTED_FILES
        if unknown and not entry.name.startswith("."):
            raise BundleError(
                name, "files", entry.name, "lies in the folder but is not listed with its sha256"
            )


def _check_external_data(folder: Path, manifest: Manifest) -> None:
    """No graph takes its weights from a file without a sha256.

    ONNX lets a tensor name a file of the folder under the key `location`, and ONNX Runtime reads it. Both
    stand in the graph as they are, so that it need not be parsed.
    """
    unlisted = [entry.name for entry in sorted(folder.iterdir()) if entry.name not in manifest.files]
    for graph, entry in manifest.graphs.items():
        with (folder / entry.file).open("rb") as stream:
            if not os.fstat(stream.fileno()).st_size:
                continue  # which cannot be mapped
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content.find(b"location") < 0:
                    continue
                text = content[:].lower()  # some file systems do not tell A from a
        for file in unlisted:
            if os.fsencode(file).lower() in text:
                problem = f"{entry.file} may read it, and it is not listed with its sha256"
                raise BundleError(manifest.name, f"graphs.{graph}.file", file, problem)


def _vocabulary(folder: Path, manifest: Manifest) -> Vocabulary:
    entry, name = manifest.vocabulary, manifest.name
    path = folder / entry.file
    if path.stat().st_size > MAX_VOCABULARY_BYTES:
        problem = f"expected at most {MAX_VOCABULARY_BYTES} bytes"
        raise BundleError(name, "vocabulary.file", path.stat().st_size, problem)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(name, "vocabulary.file", entry.file, f"expected UTF-8: {error}") from error
    tokens = tuple(text.removesuffix("\n").split("\n"))
    if len(tokens) != entry.size:
        raise BundleError(
            name, "vocabulary.size", entry.size, f"expected {len(tokens)}, the lines of {entry.file}"
        )
    if not 0 <= manifest.blank_id < entry.size:
        raise BundleError(name, "blank_id", manifest.blank_id, f"expected 0 to {entry.size - 1}")
    # word pieces of several languages may repeat: their tokenizers are put behind each other
    if entry.kind != "wordpiece" and len(set(tokens)) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if token in tokens[:index])
        raise BundleError(
            name, "vocabulary.file", twice, f"stands twice in {entry.file}; expected distinct tokens"
        )
    try:
        return Vocabulary(
            tokens, manifest.blank_id, entry.kind, frozenset(entry.special_ids), entry.word_separator
        )
    except ValueError as error:
        raise BundleError(name, "vocabulary", entry.file, str(error)) from error


def _guide(folder: Path, manifest: Manifest, vocabulary: Vocabulary) -> NgramModel | None:
    entry, name = manifest.language_model, manifest.name
    if entry is None:
        return None
    path = folder / entry.file
    if path.stat().st_size > MAX_LANGUAGE_MODEL_BYTES:
        problem = f"expected at most {MAX_LANGUAGE_MODEL_BYTES} bytes"
        raise BundleError(name, "language_model.file", path.stat().st_size, problem)
    try:
        return weigh(load_table(path), vocabulary, entry.weight, entry.bonus)
    except ValueError as error:
        raise BundleError(name, "language_model.file", entry.file, str(error)) from error


class _Node(Protocol):
    """What ONNX Runtime tells of an input or output."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> list[Any]: ...


class SessionLike(Protocol):
    """The part of onnxruntime.InferenceSession that the checks need."""

    def get_inputs(self) -> list[Any]: ...
    def get_outputs(self) -> list[Any]: ...


_INPUTS: Final = {"waveform": ("tensor(float)", 2), "lengths": ("tensor(int64)", 1)}
_OUTPUTS: Final = {"log_probs": ("tensor(float)", 3), "frame_lengths": ("tensor(int64)", 1)}
_WITH_ROWS: Final = {
    ROWS: ("tensor(float)", 3),
    PLACES: ("tensor(int64)", 3),
    "frame_lengths": ("tensor(int64)", 1),
}
"""Of a session that our kernels have changed."""


def check_session(bundle: Bundle, graph: GraphName, session: SessionLike) -> None:
    """The graph's declared inputs and outputs are the contract's. Raises BundleError otherwise."""
    file = bundle.manifest.graphs[graph].file
    outputs = {node.name: node for node in session.get_outputs()}
    for side, nodes, contract in (
        ("inputs", session.get_inputs(), _INPUTS),
        ("outputs", outputs.values(), _WITH_ROWS if ROWS in outputs else _OUTPUTS),
    ):
        field = f"graphs.{graph}.{side}"
        _check_nodes(bundle.name, field, nodes, contract, file)
    declared = outputs[ROWS if ROWS in outputs else "log_probs"].shape[2]
    size = bundle.manifest.vocabulary.size
    if isinstance(declared, int) and declared != size:
        raise BundleError(bundle.name, "vocabulary.size", size, f"expected {declared}, the outputs of {file}")


def _check_nodes(
    name: str, field: str, nodes: Iterable[_Node], contract: dict[str, tuple[str, int]], file: str
) -> None:
    found = {node.name: (node.type, len(node.shape)) for node in nodes}
    if found != contract:
        wanted = {key: f"{kind} of rank {rank}" for key, (kind, rank) in contract.items()}
        have = {key: f"{kind} of rank {rank}" for key, (kind, rank) in found.items()}
        raise BundleError(name, field, have, f"expected {wanted} in {file}")


def check_outputs(
    bundle: Bundle,
    samples: int,
    log_probs: npt.NDArray[np.float32],
    frame_lengths: npt.NDArray[np.int64],
) -> None:
    """What the graph made of `samples` samples agrees with the manifest's vocabulary and frame stride.

    Args:
        log_probs: (1, frames, vocabulary) of one unpadded item.
        frame_lengths: (1,).
    """
    manifest = bundle.manifest
    if log_probs.ndim != 3 or log_probs.shape[2] != manifest.vocabulary.size:
        problem = f"expected {log_probs.shape[-1]}, what the graph gives (shape {log_probs.shape})"
        raise BundleError(bundle.name, "vocabulary.size", manifest.vocabulary.size, problem)
    frames = int(frame_lengths[0])
    if not 0 < frames <= log_probs.shape[1]:
        problem = f"expected 1 to {log_probs.shape[1]} frames for {samples} samples"
        raise BundleError(bundle.name, "frame_lengths", frames, problem)
    duration_s = samples / manifest.sample_rate_hz
    if abs(frames * manifest.frame_stride_s - duration_s) > 3 * manifest.frame_stride_s + 0.05:
        problem = f"expected about {duration_s / frames:.4f}: {frames} frames for {duration_s:.2f} s"
        raise BundleError(bundle.name, "frame_stride_s", manifest.frame_stride_s, problem)


def verify_bundle(models_dir: Path, name: str) -> Bundle:
    """`load_bundle`, then run each graph once on two seconds of noise and check what comes out."""
    bundle = load_bundle(models_dir, name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    samples = max(2 * bundle.manifest.sample_rate_hz, bundle.manifest.input.min_samples)
    noise = np.random.default_rng(0).normal(0.0, 0.05, (1, samples)).astype(np.float32)
    feeds = {"waveform": noise, "lengths": np.array([samples], np.int64)}
    for graph in bundle.manifest.graphs:
        file = bundle.manifest.graphs[graph].file
        try:
            session = onnxruntime.InferenceSession(
                bundle.graph_path(graph), options, providers=["CPUExecutionProvider"]
            )
            check_session(bundle, graph, session)
            log_probs, frame_lengths = session.run(["log_probs", "frame_lengths"], feeds)
        except BundleError:
            raise
        except Exception as error:
            raise BundleError(
                name, f"graphs.{graph}.file", file, f"ONNX Runtime refuses it: {error}"
            ) from error
        check_outputs(bundle, samples, log_probs, frame_lengths)
        total = np.exp(log_probs[0, : int(frame_lengths[0])]).sum(axis=-1)
        if not np.allclose(total, 1.0, atol=1e-3):
            worst = float(total[np.argmax(np.abs(total - 1.0))])
            problem = "expected log-probabilities, whose exponentials sum to 1 in every frame"
            raise BundleError(name, f"graphs.{graph}.log_probs", worst, problem)
    return bundle
