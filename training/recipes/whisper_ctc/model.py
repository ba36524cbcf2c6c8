"""Whisper's encoder, on true lengths or on 30 padded seconds, and the head that turns it into a CTC model.

Weights have the names that `transformers` gives them, so that published checkpoints fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from training.augment.spectrogram import SpecAugment, SpecAugmentConfig
from training.errors import CheckpointError
from training.masks import frame_mask
from training.pretrained import rest_if_frozen
from training.recipes.whisper_ctc.frontend import WhisperLogMel
from training.restricted_pickle import load_state_dict
from training.transformer import EncoderLayer, check_heads, key_bias

FRAME_STRIDE_S = 0.02
MAX_WINDOW_S = 30.0
"""There are positions for no more."""
MIN_SAMPLES = 400
HEAD_WIDTH = 64
OPENAI_NAMES = {
    "positional_embedding": "embed_positions.weight",
    "blocks": "layers",
    "attn_ln": "self_attn_layer_norm",
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "mlp_ln": "final_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "ln_post": "layer_norm",
}
"""Parts of names in OpenAI's own checkpoints, and what `transformers` calls them."""


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of a Whisper encoder; the defaults are those of whisper-tiny."""

    bands: int = 80
    width: int = 384
    layers: int = 4
    heads: int = 6
    inner: int = 1536
    positions: int = 1500

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)

    @classmethod
    def from_transformers(cls, config: Any) -> EncoderConfig:
        """From a `transformers.WhisperConfig`."""
        return cls(
            bands=config.num_mel_bins,
            width=config.d_model,
            layers=config.encoder_layers,
            heads=config.encoder_attention_heads,
            inner=config.encoder_ffn_dim,
            positions=config.max_source_positions,
        )

    @classmethod
    def of_weights(cls, encoder: Mapping[str, Tensor]) -> EncoderConfig:
        """From an encoder's weights; a head of Whisper's is 64 wide at every size. Raises KeyError."""
        width, bands, _ = encoder["conv1.weight"].shape
        return cls(
            bands=bands,
            width=width,
            layers=len({name.split(".")[1] for name in encoder if name.startswith("layers.")}),
            heads=width // HEAD_WIDTH,
            inner=encoder["layers.0.fc1.weight"].shape[0],
            positions=encoder["embed_positions.weight"].shape[0],
        )


def rates(width: int) -> npt.NDArray[np.float32]:
    """Angles per frame of Whisper's positions, (width / 2,): periods of 2 pi to 20,000 pi frames."""
    half = width // 2
    found: npt.NDArray[np.float32] = np.exp(-np.log(10_000.0) / (half - 1) * np.arange(half)).astype(
        np.float32
    )
    return found


def sinusoids(positions: int, width: int) -> Tensor:
    """Whisper's positions (positions, width): sines, then cosines."""
    angles = np.arange(positions)[:, None] * rates(width).astype(np.float64)[None, :]
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1)).float()


class WhisperEncoder(nn.Module):
    """Two convolutions, positions, pre-norm layers."""

    def __init__(self, config: EncoderConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.bands, config.width, 3, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, 3, stride=2, padding=1)
        positions = sinusoids(config.positions, config.width)
        self.embed_positions = nn.Embedding(config.positions, config.width, _weight=positions)
        self.layers = nn.ModuleList(
            EncoderLayer(config.width, config.heads, config.inner, key_bias=False, dropout=dropout)
            for _ in range(config.layers)
        )
        self.layer_norm = nn.LayerNorm(config.width)
        self.requires_grad_()
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda module, _: module.straighten_positions()
        )

    def requires_grad_(self, requires_grad: bool = True) -> WhisperEncoder:
        """What learns; never the positions, which are sinusoids (Radford et al. 2022) and stay so."""
        super().requires_grad_(requires_grad)
        self.embed_positions.requires_grad_(False)
        return self

    def straighten_positions(self) -> None:
        """Positions that are sinusoids in half precision, as published, become exact ones.

        The graph computes them: what was read and what is served would differ by more than their rounding.
        """
        table = self.embed_positions.weight
        exact = sinusoids(*table.shape).to(table)
        if torch.allclose(table, exact, atol=1e-3):
            with torch.no_grad():
                table.copy_(exact)

    def start_from_random(self) -> None:
        """Let the convolutions keep the size of what they are given (He et al. 2015).

        With torch's own start what was heard is a 25th of the positions, and CTC stays at blanks.
        """
        for convolution in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")

    def forward(self, features: Tensor, lengths: Tensor, *, fixed: bool = False) -> tuple[Tensor, Tensor]:
        """(batch, frames, bands), (batch,) -> (batch, frames / 2 rounded up, width), (batch,).

        With `fixed` nothing is masked: all 30 seconds count, as Whisper was trained.
        """
        values = functional.gelu(self.conv1(features.transpose(1, 2)))
        if not fixed:
            values = values * frame_mask(lengths, values.shape[-1])[:, None, :]
        values = functional.gelu(self.conv2(values)).transpose(1, 2)
        lengths = torch.div(lengths + 1, 2, rounding_mode="floor")
        frames = values.shape[1]
        if frames > self.config.positions:
            raise ValueError(f"{frames} frames, the encoder has positions for {self.config.positions} (30 s)")
        values = values + self.embed_positions.weight[:frames]
        bias = None if fixed else key_bias(lengths, frames)
        for layer in self.layers:
            values = layer(values, bias)
        return self.layer_norm(values), lengths


class WhisperCtc(nn.Module):
    """Front end, encoder, head `Linear-GELU-LayerNorm-Linear`."""

    def __init__(
        self,
        config: EncoderConfig,
        outputs: int,
        *,
        hidden: int | None = None,
        fixed: bool = False,
        dropout: float = 0.0,
        augment: SpecAugmentConfig | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden or config.width
        self.config, self.fixed = config, fixed
        self.frontend = WhisperLogMel(config.bands, fixed=fixed)
        self.augment = SpecAugment(augment) if augment else None
        self.encoder = WhisperEncoder(config, dropout)
        self.ctc_head = nn.Sequential(
            nn.Linear(config.width, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, outputs)
        )

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, samples), (batch,) -> log_probs (batch, frames, vocabulary), frame lengths (batch,)."""
        with torch.autocast(waveform.device.type, enabled=False):
            features, counts = self.frontend(waveform.float(), lengths)
        if self.augment is not None:
            features = self.augment(features.transpose(1, 2), counts).transpose(1, 2)
        frozen = not any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            hidden, counts = self.encoder(features, counts, fixed=self.fixed)
        return functional.log_softmax(self.ctc_head(hidden).float(), dim=-1), counts

    def train(self, mode: bool = True) -> Self:
        """Training mode; an encoder that does not learn stays in evaluation mode."""
        super().train(mode)
        rest_if_frozen(self.encoder)
        return self


def read_published(path: Path) -> dict[str, Tensor]:
    """`encoder.*` and `ctc_head.*` of a Lightning checkpoint or a run's weights. Raises CheckpointError."""
    state = load_state_dict(path)
    for name in ("ctc_head.0.weight", "ctc_head.3.weight"):
        if name not in state:
            raise CheckpointError(f"{path.name}: {name} is missing; it has {sorted(state)[:3]} and more")
    return {name: value for name, value in state.items() if name.startswith(("encoder.", "ctc_head."))}


def is_openai(base: str) -> bool:
    """Whether a base is a file of OpenAI's, not a folder or a name on the hub."""
    return base.endswith(".pt")


def read_openai(path: Path) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """The encoder of OpenAI's own file, such as `tiny.en.pt`, under our names. Raises CheckpointError."""
    state = {}
    for name, value in load_state_dict(path).items():
        if name.startswith("encoder."):
            ours = f".{name.removeprefix('encoder.')}."
            for theirs, other in OPENAI_NAMES.items():
                ours = ours.replace(f".{theirs}.", f".{other}.")
            state[ours.strip(".")] = value
    try:
        return EncoderConfig.of_weights(state), state
    except KeyError as error:
        raise CheckpointError(f"{path.name}: not a Whisper checkpoint of OpenAI's: no {error}") from error


def head_shape(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Hidden width and outputs of a head's weights, `ctc_head.0.weight` and `ctc_head.3.weight`."""
    return state["ctc_head.0.weight"].shape[0], state["ctc_head.3.weight"].shape[0]
