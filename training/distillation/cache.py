"""Stage 1: audio of a manifest -> one memory-mapped file of samples and one of log-mel features.

    python -m training.distillation.cache --manifest MANIFEST --out CACHE

Writes ``pcm.i16`` (int16, 16 kHz mono, utterances back to back), ``mel.npy`` (float16 ``(frames, 64)``
log-mel before the per-feature normalisation, so that augmentation can add noise as power), and
``index.json`` with each utterance's offsets; ``manifest.sha256`` says of what they were made.
What libsndfile cannot read (m4a) FFmpeg's libraries do; a shard is read once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from api.bundle import sha256_of
from training.data.audio import decode_waveform
from training.data.shards import shard_members
from training.distillation.dataset import Utterance, read_utterances
from training.errors import ConfigError, DataError, in_one_line
from training.files import written_whole
from training.frontend import LogMel

SAMPLE_RATE_HZ = 16_000
DIGEST = "manifest.sha256"


def decode_audio(row: Utterance, data: bytes) -> npt.NDArray[np.int16]:
    """Encoded audio -> the row's stretch of it, int16 mono samples at 16 kHz, shape ``(samples,)``.

    Raises UndecodableAudioError.
    """
    mono = decode_waveform(data, row.id, SAMPLE_RATE_HZ, row.offset_s, row.duration_s)
    samples_i16: npt.NDArray[np.int16] = np.clip(np.round(mono * 32767.0), -32768, 32767).astype(np.int16)
    return samples_i16


def iterate_encoded(rows: list[Utterance], folder: Path) -> Iterator[tuple[int, bytes]]:
    """``(row index, encoded bytes)`` of every row, shard by shard."""
    by_shard: dict[str, dict[str, list[int]]] = {}
    for index, row in enumerate(rows):
        by_shard.setdefault(row.shard, {}).setdefault(row.audio_filepath, []).append(index)
    for shard, names in sorted(by_shard.items()):
        if not shard:
            for name, indices in names.items():
                data = (folder / name).read_bytes()
                yield from ((index, data) for index in indices)
            continue
        for name, data in shard_members(folder / shard, names):
            yield from ((index, data) for index in names[name])


def write_pcm(rows: list[Utterance], folder: Path, out: Path) -> None:
    """Decode every row into ``out/pcm.i16`` and write ``out/index.json``.

    Raises DataError for lost or bad audio.
    """
    starts = np.zeros(len(rows), np.int64)
    lengths = np.zeros(len(rows), np.int64)
    position = 0
    partial = out / "pcm.partial"
    with partial.open("wb") as sink, ThreadPoolExecutor(2) as pool:
        pending = iterate_encoded(rows, folder)
        progress = tqdm(total=len(rows), desc="decode", unit="clip", mininterval=2)
        while batch := [item for _, item in zip(range(64), pending, strict=False)]:
            for (index, _), samples in zip(
                batch,
                pool.map(decode_audio, [rows[index] for index, _ in batch], [data for _, data in batch]),
                strict=True,
            ):
                starts[index], lengths[index] = position, len(samples)
                position += len(samples)
                sink.write(samples.tobytes())
                progress.update()
        progress.close()
    missing = [rows[index].id for index in np.flatnonzero(lengths == 0)]
    if missing:
        raise DataError(f"{len(missing)} utterances have no audio, first: {missing[:3]}")
    partial.rename(out / "pcm.i16")
    index_rows = [
        asdict(row) | {"pcm_start": int(start), "pcm_samples": int(length)}
        for row, start, length in zip(rows, starts, lengths, strict=True)
    ]
    write_index(out, index_rows)


def write_index(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``out/index.json``, whole or not at all."""
    with written_whole(out / "index.json") as partial:
        partial.write_text(json.dumps(rows), encoding="utf-8")


def write_mel(out: Path) -> None:
    """Features of every utterance in ``out/index.json``: ``out/mel.npy`` and their offsets in the index."""
    index = json.loads((out / "index.json").read_text(encoding="utf-8"))
    frontend = LogMel()
    hop = frontend.config.hop_samples
    counts = [row["pcm_samples"] // hop + 1 for row in index]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    shape = (int(starts[-1]), frontend.config.features)
    partial = out / "mel.partial.npy"
    mel = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    pcm = np.memmap(out / "pcm.i16", np.int16, mode="r")
    for row, start, count in zip(
        tqdm(index, desc="log-mel", unit="clip", mininterval=2), starts, counts, strict=False
    ):
        samples = pcm[row["pcm_start"] : row["pcm_start"] + row["pcm_samples"]].astype(np.float32) / 32768.0
        values, _ = frontend.log_mel(torch.from_numpy(samples)[None], torch.tensor([len(samples)]))
        mel[start : start + count] = values[0].numpy()
        row["mel_start"], row["mel_frames"] = int(start), int(count)
    mel.flush()
    write_index(out, index)  # before the features get their name, which says that this stage is done
    partial.rename(out / "mel.npy")


def check_manifest(manifest: Path, out: Path) -> None:
    """Raises ConfigError where a cache was made of another manifest than this one.

    One that is gone, or a cache that does not say of what it was made, leaves the cache as it is.
    """
    made_of = out / DIGEST
    if (
        manifest.is_file()
        and made_of.is_file()
        and made_of.read_text(encoding="utf-8") != sha256_of(manifest)
    ):
        raise ConfigError(f"--manifest {manifest}: {out} was made of another manifest; give another --out")


@in_one_line("cache")
def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if (arguments.out / "index.json").exists():
        check_manifest(arguments.manifest, arguments.out)
    else:
        rows = read_utterances(arguments.manifest)
        # before the index, without which it counts for nothing
        (arguments.out / DIGEST).write_text(sha256_of(arguments.manifest), encoding="utf-8")
        write_pcm(rows, arguments.manifest.parent, arguments.out)
    if not (arguments.out / "mel.npy").exists():
        with torch.inference_mode():
            write_mel(arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
