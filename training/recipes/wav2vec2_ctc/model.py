"""wav2vec2 (Baevski et al. 2020) of the XLSR kind (Conneau et al. 2020) with a CTC head.

XLSR's variant: layer normalisation after every convolution of the feature encoder, pre-norm layers after it.
Frames depend on their own samples only and attention on own frames only, so batched equals alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.errors import CheckpointError
from training.masks import frame_mask
from training.transformer import EncoderLayer, check_heads, key_bias

Count = TypeVar("Count", int, Tensor)

_XLSR_KIND = {
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "feat_extract_activation": "gelu",
    "hidden_act": "gelu",
    "add_adapter": False,
    "adapter_attn_dim": None,
}
"""What a `transformers.Wav2Vec2Config` says of it."""


@dataclass(frozen=True)
class Wav2Vec2Config:
    """Shape of the network; the defaults are those of wav2vec2-large-xlsr-53 (315 million parameters)."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    inner: int = 4096
    channels: tuple[int, ...] = (512,) * 7
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    position_kernel: int = 128
    position_groups: int = 16
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)
        if not len(self.channels) == len(self.kernels) == len(self.strides):
            raise ValueError("channels, kernels and strides are one number per convolution each")
        if self.width % self.position_groups:
            raise ValueError(
                f"width {self.width} is not a multiple of {self.position_groups} position_groups"
            )

    @classmethod
    def from_transformers(cls, config: Any) -> Wav2Vec2Config:
        """From a `transformers.Wav2Vec2Config`. Raises CheckpointError for other kinds.

        Those are wav2vec2-base's, and networks with adapters (MMS).
        """
        others = [
            f"{name} is {found!r}, not {expected!r}"
            for name, expected in _XLSR_KIND.items()
            if (found := getattr(config, name)) != expected
        ]
        if others:
            raise CheckpointError(f"only the XLSR kind is known; of this checkpoint {', '.join(others)}")
        return cls(
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            inner=config.intermediate_size,
            channels=tuple(config.conv_dim),
            kernels=tuple(config.conv_kernel),
            strides=tuple(config.conv_stride),
            position_kernel=config.num_conv_pos_embeddings,
            position_groups=config.num_conv_pos_embedding_groups,
            norm_eps=config.layer_norm_eps,
        )

    @property
    def stride_samples(self) -> int:
        """Samples from one output frame to the next."""
        out = 1
        for stride in self.strides:
            out *= stride
        return out

    @property
    def min_samples(self) -> int:
        """Samples that give one frame."""
        need = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            need = (need - 1) * stride + kernel
        return need

    def frames(self, samples: Count) -> Count:
        """Frames of so many samples; 0 or less where they are too few for one."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples


class FeatureEncoderLayer(nn.Module):
    """Convolution without padding, layer normalisation over channels, GELU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride)
        self.layer_norm = nn.LayerNorm(outputs)

    def forward(self, values: Tensor) -> Tensor:
        """(batch, inputs, frames) -> (batch, outputs, frames')."""
        normal = self.layer_norm(self.conv(values).transpose(1, 2)).transpose(1, 2)
        return functional.gelu(normal)


class Wav2Vec2Ctc(nn.Module):
    """Waveform in, log-probabilities out."""

    def __init__(
        self, config: Wav2Vec2Config, outputs: int, *, dropout: float = 0.0, mask_share: float = 0.0
    ) -> None:
        super().__init__()
        self.config = config
        inputs = (1, *config.channels[:-1])
        self.features = nn.ModuleList(
            FeatureEncoderLayer(*shape)
            for shape in zip(inputs, config.channels, config.kernels, config.strides, strict=True)
        )
        self.projection_norm = nn.LayerNorm(config.channels[-1], eps=config.norm_eps)
        self.projection = nn.Linear(config.channels[-1], config.width)
        self.masked = nn.Parameter(torch.zeros(config.width))
        self.positions = nn.Conv1d(
            config.width,
            config.width,
            config.position_kernel,
            padding=config.position_kernel // 2,
            groups=config.position_groups,
        )
        self.layers = nn.ModuleList(
            EncoderLayer(config.width, config.heads, config.inner, dropout=dropout)
            for _ in range(config.layers)
        )
        self.layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(config.width, outputs)
        self.mask_share = mask_share

    def frame_lengths(self, lengths: Tensor) -> Tensor:
        """Frames per item; int64 (batch,)."""
        return self.config.frames(lengths)

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, samples), (batch,) -> log_probs (batch, frames, vocabulary), frame lengths (batch,)."""
        own = frame_mask(lengths, waveform.shape[1])
        count = lengths[:, None].float()
        mean = (waveform * own).sum(dim=1, keepdim=True) / count
        centred = (waveform - mean) * own
        signal = centred / torch.sqrt((centred * centred).sum(dim=1, keepdim=True) / count + 1e-7)
        values = signal[:, None, :]
        for layer in self.features:
            values = layer(values)
        hidden = self.projection(self.projection_norm(values.transpose(1, 2)))
        counts, frames = self.frame_lengths(lengths), hidden.shape[1]
        if self.training and self.mask_share > 0:
            hidden = torch.where(
                self._masks(counts, frames)[:, :, None], self.masked.to(hidden.dtype), hidden
            )
        hidden = hidden * frame_mask(counts, frames)[:, :, None]
        placed = self.positions(hidden.transpose(1, 2))[:, :, :frames]
        hidden = self.dropout(hidden + functional.gelu(placed).transpose(1, 2))
        bias = key_bias(counts, frames)
        for layer in self.layers:
            hidden = layer(hidden, bias)
        logits = self.head(self.dropout(self.layer_norm(hidden)))
        return functional.log_softmax(logits.float(), dim=-1), counts

    def _masks(self, counts: Tensor, frames: int, span: int = 10) -> Tensor:
        """(batch, frames) bool: stretches of `span` frames that together cover about `mask_share`."""
        starts = torch.rand(len(counts), frames, device=counts.device) < self.mask_share / span
        grown = functional.max_pool1d(starts.float(), span, stride=1, padding=span // 2)[:, :frames]
        return grown > 0


_PLACES = {
    "masked_spec_embed": "masked",
    "feature_extractor.conv_layers.": "features.",
    "feature_projection.layer_norm.": "projection_norm.",
    "feature_projection.projection.": "projection.",
    "encoder.layer_norm.": "layer_norm.",
    "encoder.pos_conv_embed.conv.": "positions.",
    "lm_head.": "head.",
}
_PARTS = {
    "attention.": "self_attn.",
    "layer_norm.": "self_attn_layer_norm.",
    "feed_forward.intermediate_dense.": "fc1.",
    "feed_forward.output_dense.": "fc2.",
    "final_layer_norm.": "final_layer_norm.",
}
_NORMALISED = (("weight_g", "weight_v"), tuple(f"parametrizations.weight.original{part}" for part in (0, 1)))
"""Magnitude and direction of the position convolution, as torch called them first and as it does now."""
_OF_PRE_TRAINING = ("quantizer.", "project_hid.", "project_q.")


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a `transformers.Wav2Vec2Model` (or of a ForCTC with its prefix) under our names.

    The position convolution's weight normalisation is multiplied out; what only pre-training uses is dropped.
    Raises CheckpointError for any other tensor that the network has no place for.
    """
    plain = {name.removeprefix("wav2vec2."): value for name, value in state.items()}
    out = {_place(name): value for name, value in plain.items() if not name.startswith(_OF_PRE_TRAINING)}
    for names in _NORMALISED:
        magnitude, direction = (out.pop(f"positions.{name}", None) for name in names)
        if magnitude is not None and direction is not None:
            norm = direction.float().norm(dim=(0, 1), keepdim=True)
            out["positions.weight"] = direction.float() * (magnitude.float() / norm)
    return out


def _place(name: str) -> str:
    """Our name of a tensor. Raises CheckpointError."""
    places, before, rest = _PLACES, "", name
    if name.startswith("encoder.layers."):
        _, _, index, rest = name.split(".", 3)
        places, before = _PARTS, f"layers.{index}."
    for theirs, ours in places.items():
        if rest.startswith(theirs):
            return before + ours + rest.removeprefix(theirs)
    raise CheckpointError(f"{name}: the XLSR kind has no such tensor, and without it the network is another")
