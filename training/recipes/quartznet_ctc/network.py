"""Waveform-in QuartzNet for the shared training loop, and the transfer of an encoder to a new alphabet."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from training.augment.spectrogram import SpecAugment, SpecAugmentConfig
from training.errors import CheckpointError
from training.frontend import FrontendConfig, LogMel
from training.nemo import read_nemo
from training.nemo_archive import NemoError
from training.pretrained import FrozenNorms
from training.recipes.quartznet_ctc.model import QuartzNet, QuartzNetConfig


class QuartzNetCtc(FrozenNorms):
    """Log-mel front end, SpecAugment while training, QuartzNet."""

    def __init__(
        self,
        model: QuartzNet,
        frontend: FrontendConfig,
        augment: SpecAugmentConfig | None = None,
        *,
        frozen_norms: bool = False,
    ) -> None:
        super().__init__()
        self.frontend = LogMel(frontend)
        self.augment = SpecAugment(augment) if augment else None
        self.model = model
        self.frozen_norms = frozen_norms

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, samples), (batch,) -> log_probs (batch, frames, vocabulary), frame lengths (batch,)."""
        with torch.autocast(waveform.device.type, enabled=False):
            features, frame_lengths = self.frontend(waveform.float(), lengths)
        if self.augment is not None:
            features = self.augment(features, frame_lengths)
        out = self.model(features, frame_lengths)
        return out.log_probs, out.lengths


def transferred(archive: Path, vocabulary_size: int) -> tuple[QuartzNet, FrontendConfig]:
    """The network of a `.nemo` archive with its encoder kept and a new decoder of `vocabulary_size` outputs.

    Published archives may have their batch norms folded into the convolutions, so their statistics are not
    those of the activations: train such a network with `frozen_norms`. Raises CheckpointError.
    """
    try:
        source = read_nemo(archive)
    except (NemoError, FileNotFoundError) as error:
        raise CheckpointError(f"model.transfer_from: {error}") from error
    config: QuartzNetConfig = source.model.config.with_vocabulary(vocabulary_size)
    network = QuartzNet(config)
    encoder = {name: value for name, value in source.model.state_dict().items() if name.startswith("blocks.")}
    missing, unexpected = network.load_state_dict(encoder, strict=False)
    if unexpected or any(not name.startswith("head.") for name in missing):
        raise CheckpointError(f"{archive}: the encoder does not fit: {[*missing, *unexpected][:3]}")
    return network, source.frontend
