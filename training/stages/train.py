"""Stage 2: train; the best state by validation WER becomes `weights.safetensors`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from training.augment.waveform import WaveformAugment
from training.data.manifest import Utterance
from training.errors import CheckpointError, ConfigError, EmptyManifestError
from training.files import written_whole
from training.graph import MOST_BYTES
from training.loop.dataset import UtteranceDataset, make_loader
from training.loop.fit import fit
from training.loop.run_folder import WEIGHTS, RunFolder, read_metrics
from training.pretrained import read_weights
from training.stages.recipe import Recipe
from training.vocabulary import TokenCodec


def train(recipe: Recipe, rows: dict[str, list[Utterance]], folder: RunFolder) -> Path:
    """Train and store the weights with the lowest validation WER, of equals those with the lowest CER.

    Goes on where an earlier call stopped.
    """
    settings = recipe.config.training
    stored = folder.read_json("train.json")
    wanted = settings.model_dump(mode="json")
    if stored is not None and stored["settings"] == wanted and (folder.path / WEIGHTS).is_file():
        return folder.path / WEIGHTS
    for part in ("train", "validation"):
        if not rows[part]:
            raise EmptyManifestError(f"the {part} part is empty")
    codec = recipe.codec()
    torch.manual_seed(settings.seed)
    network = recipe.network(codec)
    fits_one_file(network)
    facts = recipe.facts()
    augment = recipe.config.augment
    changed = (
        WaveformAugment(augment.waveform, facts.sample_rate_hz, facts.longest_s)
        if augment and augment.waveform
        else None
    )
    rate_hz, padded_s = facts.sample_rate_hz, facts.padded_s
    training = UtteranceDataset(rows["train"], codec.encode, rate_hz, changed, padded_s)
    validation = UtteranceDataset(rows["validation"], codec.encode, rate_hz, None, padded_s)
    best = fit(
        recipe.module(network, codec),
        make_loader(training, settings, training=True),
        make_loader(validation, settings, training=False),
        settings,
        folder,
    )
    state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
    weights = {name.removeprefix("model."): value.contiguous() for name, value in state.items()}
    store_weights(weights, folder)
    metrics = read_metrics(folder.metrics)
    folder.write_json(
        "train.json",
        {"settings": wanted, "best_checkpoint": best.name, "epochs": len(metrics), "history": metrics},
    )
    return folder.path / WEIGHTS


def store_weights(weights: dict[str, torch.Tensor], folder: RunFolder) -> Path:
    """Keep the weights of a run, whole or not at all; graphs of others go. Raises DiskFullError."""
    folder.forget_graphs()
    size_bytes = sum(value.nbytes for value in weights.values())
    with written_whole(folder.path / WEIGHTS, size_bytes) as partial:
        save_file(unshared(weights), partial)
    return folder.path / WEIGHTS


def fits_one_file(network: nn.Module) -> None:
    """Refuse before the training what cannot be exported after it. Raises ConfigError."""
    size_bytes = 4 * sum(parameter.numel() for parameter in network.parameters())
    if size_bytes > MOST_BYTES:
        raise ConfigError(
            f"model: {size_bytes / 1e9:.1f} GB of weights in float32; a bundle's graph is one file, and ONNX "
            f"limits it to {MOST_BYTES / 1e9:.1f} GB; choose a smaller base"
        )


def unshared(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of every tensor that shares its memory with one before it (tied weights)."""
    seen: set[int] = set()
    out = {}
    for name, value in weights.items():
        out[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return out


def trained_weights(path: Path) -> Path:
    """The file, which is there. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no trained weights; run the train stage first")
    return path


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """Put stored weights into a network, in evaluation mode. Raises CheckpointError."""
    weights = read_weights(trained_weights(path))
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit the network of this configuration: {error}") from error
    return network.eval()


def trained(recipe: Recipe, codec: TokenCodec, folder: RunFolder) -> nn.Module:
    """The network of a finished training."""
    return load_weights(recipe.network(codec), folder.path / WEIGHTS)
