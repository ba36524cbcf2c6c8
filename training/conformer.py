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
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ParakeetCTCConfig, ParakeetEncoderConfig, ParakeetForCTC
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderSubsamplingConv2D

from training.augment.spectrogram import SpecAugment, SpecAugmentConfig
from training.frontend import FrontendConfig, LogMel
from training.masks import frame_mask
from training.pretrained import FrozenNorms, rest_if_frozen
from training.transformer import check_heads

Subsampling = Literal["striding", "dw_striding"]


@dataclass(frozen=True)
class ConformerConfig:
    """Shape of the network; the defaults are those of FastConformer-large (109 million parameters)."""

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
    upsample: int = 1
    """Output frames per frame of the layers: letters need one every 20 ms or so, FastConformer has 80."""

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)
        if self.kernel % 2 == 0 or self.kernel < 1:
            raise ValueError(f"kernel {self.kernel}: expected an odd number")
        if self.subsampling_factor < 2 or self.subsampling_factor & (self.subsampling_factor - 1):
            raise ValueError(f"subsampling_factor {self.subsampling_factor}: expected a power of two from 2")
        if self.features % self.subsampling_factor:
            raise ValueError(f"features {self.features}: expected a multiple of {self.subsampling_factor}")
        if self.upsample < 1:
            raise ValueError(f"upsample {self.upsample}: expected at least 1")

    @property
    def stride(self) -> float:
        """Feature frames per output frame."""
        return self.subsampling_factor / self.upsample

    def for_transformers(self, outputs: int, dropout: float) -> ParakeetCTCConfig:
        """The same for `transformers`."""
        encoder = ParakeetEncoderConfig(
            dropout=dropout,
            activation_dropout=dropout,
            attention_dropout=dropout,
            layerdrop=0.0,
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
        size = self.upsample * outputs
        return ParakeetCTCConfig(vocab_size=size, pad_token_id=size - 1, encoder_config=encoder.to_dict())


class _Striding(ParakeetEncoderSubsamplingConv2D):
    """Full strided convolutions instead of depthwise and pointwise ones."""

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = []
        for inputs in [1] + [self.channels] * (self.num_layers - 1):
            layers.append(nn.Conv2d(inputs, self.channels, self.kernel_size, self.stride, self.padding))
            layers.append(nn.ReLU())
        self.layers = nn.ModuleList(layers)


class ConformerCtc(FrozenNorms):
    """Waveform in, log-probabilities out; `outputs` of the head include the blank, which is the last."""

    def __init__(
        self,
        config: ConformerConfig,
        outputs: int,
        frontend: FrontendConfig,
        *,
        dropout: float = 0.0,
        augment: SpecAugmentConfig | None = None,
        frozen_norms: bool = False,
    ) -> None:
        super().__init__()
        if frontend.features != config.features:
            raise ValueError(f"{frontend.features} features for a network of {config.features}")
        self.config, self.outputs, self.frozen_norms = config, outputs, frozen_norms
        self.frontend = LogMel(frontend)
        self.augment = SpecAugment(augment) if augment else None
        self.network: Any = ParakeetForCTC(config.for_transformers(outputs, dropout))
        if config.subsampling == "striding":
            described: Any = self.network.config.encoder_config
            self.network.encoder.subsampling = _Striding(described)
        for module in self.network.modules():  # transformers' own start hardly lets the input through
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                module.reset_parameters()

    @property
    def frame_stride_s(self) -> float:
        """Seconds from one output frame to the next."""
        return self.frontend.config.hop_s * self.config.stride

    def positions(self, frames: int) -> Tensor:
        """Sinusoids of the distances from frames - 1 down to 1 - frames, (2 * frames - 1, width)."""
        out: Tensor = self.network.encoder.encode_positions(torch.zeros(1, frames, self.config.width))[0]
        return out

    def train(self, mode: bool = True) -> Self:
        """Training mode; an encoder that does not learn stays in evaluation mode."""
        super().train(mode)
        rest_if_frozen(self.network.encoder)
        return self

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, samples), (batch,) -> log_probs (batch, frames, vocabulary), frame lengths (batch,)."""
        with torch.autocast(waveform.device.type, enabled=False):
            features, counts = self.frontend(waveform.float(), lengths)
        if self.augment is not None:
            features = self.augment(features, counts)
        own = frame_mask(counts, features.shape[2])
        logits = self.network(features.transpose(1, 2), attention_mask=own).logits
        logits = logits.reshape(len(logits), -1, self.outputs).float()
        steps = self.config.subsampling_factor
        counts = (counts + steps - 1) // steps * self.config.upsample
        return functional.log_softmax(logits, dim=-1), counts
