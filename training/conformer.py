"""Conformer and FastConformer encoders with a CTC head, as NeMo trains them, ready to be exported.

Sources: Gulati et al. 2020, "Conformer: convolution-augmented Transformer for speech recognition"; Rekesh et
al. 2023, "Fast Conformer with linearly scalable attention" (depthwise subsampling by eight); Dai et al. 2019,
"Transformer-XL" (relative positions, appendix B).

The network is that of `transformers` (Parakeet), which this project only feeds and writes down as ONNX
(training/conformer_graph.py): two implementations that do not know each other are then compared at every
conversion. The fourfold subsampling of Conformer-CTC, which `transformers` does not have, is added here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ParakeetCTCConfig, ParakeetEncoderConfig, ParakeetForCTC
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderSubsamplingConv2D

from training.frontend import FrontendConfig, LogMel
from training.masks import frame_mask
from training.transformer import check_heads

Subsampling = Literal["striding", "dw_striding"]


@dataclass(frozen=True)
class ConformerConfig:
    """Shape of the network; the defaults are those of FastConformer-large (115 million parameters)."""

    outputs: int
    """Of the head, the blank included, which is the last."""
    features: int = 80
    width: int = 512
    layers: int = 17
    heads: int = 8
    inner: int = 2048
    """Width inside the feed-forward modules."""
    kernel: int = 9
    """Frames that the depthwise convolution of a layer sees; odd."""
    subsampling: Subsampling = "dw_striding"
    """Strided 2-D convolutions over time and features: full ones, or depthwise ones after the first."""
    subsampling_factor: int = 8
    subsampling_channels: int = 256
    scale_input: bool = True
    """Multiply the layers' input by the square root of the width."""
    bias: bool = True
    """Of the linear layers and convolutions inside the layers."""

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)
        if self.kernel % 2 == 0 or self.kernel < 1:
            raise ValueError(f"kernel {self.kernel}: expected an odd number")
        if self.subsampling_factor < 2 or self.subsampling_factor & (self.subsampling_factor - 1):
            raise ValueError(f"subsampling_factor {self.subsampling_factor}: expected a power of two from 2")
        if self.features % self.subsampling_factor:
            raise ValueError(f"features {self.features}: expected a multiple of {self.subsampling_factor}")

    def for_transformers(self) -> ParakeetCTCConfig:
        """The same for `transformers`."""
        encoder = ParakeetEncoderConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.inner,
            attention_bias=self.bias,
            convolution_bias=self.bias,
            conv_kernel_size=self.kernel,
            subsampling_factor=self.subsampling_factor,
            subsampling_conv_channels=self.subsampling_channels,
            num_mel_bins=self.features,
            scale_input=self.scale_input,
        )
        return ParakeetCTCConfig(
            vocab_size=self.outputs, pad_token_id=self.outputs - 1, encoder_config=encoder.to_dict()
        )


class _Striding(ParakeetEncoderSubsamplingConv2D):
    """Full strided convolutions instead of depthwise and pointwise ones."""

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = []
        for inputs in [1] + [self.channels] * (self.num_layers - 1):
            layers.append(nn.Conv2d(inputs, self.channels, self.kernel_size, self.stride, self.padding))
            layers.append(nn.ReLU())
        self.layers = nn.ModuleList(layers)


class ConformerCtc(nn.Module):
    """Waveform in, log-probabilities out."""

    def __init__(self, config: ConformerConfig, frontend: FrontendConfig) -> None:
        super().__init__()
        if frontend.features != config.features:
            raise ValueError(f"{frontend.features} features for a network of {config.features}")
        self.config = config
        self.frontend = LogMel(frontend)
        self.network: Any = ParakeetForCTC(config.for_transformers())
        if config.subsampling == "striding":
            described: Any = self.network.config.encoder_config
            self.network.encoder.subsampling = _Striding(described)

    @property
    def frame_stride_s(self) -> float:
        """Seconds from one output frame to the next."""
        return self.frontend.config.hop_s * self.config.subsampling_factor

    def positions(self, frames: int) -> Tensor:
        """Sinusoids of the distances from frames - 1 down to 1 - frames, (2 * frames - 1, width)."""
        out: Tensor = self.network.encoder.encode_positions(torch.zeros(1, frames, self.config.width))[0]
        return out

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, samples), (batch,) -> log_probs (batch, frames, vocabulary), frame lengths (batch,)."""
        features, counts = self.frontend(waveform, lengths)
        own = frame_mask(counts, features.shape[2])
        logits = self.network(features.transpose(1, 2), attention_mask=own).logits
        steps = self.config.subsampling_factor
        return functional.log_softmax(logits.float(), dim=-1), (counts + steps - 1) // steps
