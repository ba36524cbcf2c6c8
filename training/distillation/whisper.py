"""Trains a :class:`WhisperCtc` on a CPU, in bfloat16 where the processor has it.

Features are computed when they are asked for. :class:`FastWhisper` owns no weights: it reads those of the
wrapped network. The convolutions are products of their taps, and attention is written out: at a few hundred
frames that is faster than torch's fused form.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from training.distillation.augment import LN_10, AugmentConfig
from training.distillation.conformer import MISSING, product
from training.distillation.dataset import BLANK_ID, VALIDATION_FRACTION
from training.distillation.examples import Corpus
from training.distillation.kernels import working_dtype
from training.masks import frame_mask
from training.recipes.quartznet_ctc.model import CtcOutput
from training.recipes.whisper_ctc.frontend import FLOOR, WhisperLogMel, own_in_range
from training.recipes.whisper_ctc.model import WhisperCtc, WhisperEncoder
from training.transformer import Attention, EncoderLayer

LEAD_FRAMES = 6
"""How much earlier than the teacher a Whisper encoder answers, in frames of 20 ms, left to itself (measured:
docs/experiments.md); the teacher's answers are moved by as much."""


def cached_log_mel(frontend: WhisperLogMel, pcm: npt.NDArray[np.int16], start: int, count: int) -> Tensor:
    """Natural logarithms of the energies of a stretch of the cached samples, (frames, bands) float32."""
    samples = torch.from_numpy(pcm[start : start + count].astype(np.float32) / 32768.0)
    log_mel, _ = frontend.log_mel(samples[None], torch.tensor([count]))
    return log_mel[0] * LN_10


class WhisperCorpus(Corpus):
    """The cache for a student of Whisper's kind: 80 bands, on Whisper's scale, which hears loudness."""

    augmentation = AugmentConfig(max_gain_db=8.0, lone_noise=0.8)

    def __init__(
        self, cache: Path, min_confidence: float, validation_fraction: float = VALIDATION_FRACTION
    ) -> None:
        super().__init__(cache, min_confidence, validation_fraction)
        self.pcm = np.memmap(cache / "pcm.i16", np.int16, mode="r")
        self.frontend = WhisperLogMel()

    def features(self, index: int) -> Tensor:
        """Natural logarithms of the energies, (frames, 80) float32."""
        return cached_log_mel(self.frontend, self.pcm, *self.pcm_spans[index])

    def targets(self, index: int) -> tuple[Tensor, Tensor]:
        """As the teacher would answer `LEAD_FRAMES` earlier."""
        posteriors, hidden = super().targets(index)
        ends = torch.zeros(min(LEAD_FRAMES, len(posteriors)), posteriors.shape[1])
        ends[:, BLANK_ID] = 1.0
        last = hidden[-1:].expand(len(ends), -1)
        return torch.cat([posteriors[LEAD_FRAMES:], ends]), torch.cat([hidden[LEAD_FRAMES:], last])

    @staticmethod
    def normalise(values: Tensor, lengths: Tensor) -> Tensor:
        """Natural logarithms (B,T,F) as Whisper wants them; zeros beyond each item's frames."""
        return own_in_range((values / LN_10).clamp(min=math.log10(FLOOR)), lengths)


def _convolved(values: Tensor, module: nn.Conv1d) -> Tensor:
    """A Conv1d of three taps as one product: (B,T,C) -> (B, T / stride, C')."""
    stride = module.stride[0]
    padded = functional.pad(values, (0, 0, 1, 1))
    count = (values.shape[1] - 1) // stride + 1
    taps = [padded[:, tap : tap + stride * (count - 1) + 1 : stride] for tap in range(3)]
    weight = module.weight.permute(0, 2, 1).flatten(1).to(values.dtype)
    bias = None if module.bias is None else module.bias.to(values.dtype)
    return functional.gelu(functional.linear(torch.cat(taps, dim=2), weight, bias))


def normal(values: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Layer normalisation in the precision of `values`."""
    weight, bias = norm.weight.to(values.dtype), norm.bias.to(values.dtype)
    return functional.layer_norm(values, norm.normalized_shape, weight, bias, norm.eps)


def linear(values: Tensor, module: nn.Linear) -> Tensor:
    """A linear layer in the precision of `values`."""
    return product(values, module.weight, module.bias)


def fast_encoder(
    encoder: WhisperEncoder, features: Tensor, lengths: Tensor, hidden_layers: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """All of an encoder but its last normalisation, in :func:`working_dtype`.

    Args:
        encoder: whose weights are read.
        features: (batch, frames, bands), zero beyond lengths (batch,).
        hidden_layers: whose outputs are wanted, too.

    Returns states (batch, frames / 2, width), lengths, what is added to the scores of frames that an item
    does not have, (batch, 1, 1, frames / 2), and the wanted layers' outputs.
    """
    values = _convolved(features.to(working_dtype()), encoder.conv1)
    values = _convolved(values * frame_mask(lengths, values.shape[1])[:, :, None], encoder.conv2)
    lengths = torch.div(lengths + 1, 2, rounding_mode="floor")
    frames = values.shape[1]
    values = values + encoder.embed_positions.weight[:frames].to(values.dtype)
    missing = torch.zeros(len(values), 1, 1, frames, dtype=values.dtype)
    missing = missing.masked_fill(~frame_mask(lengths, frames)[:, None, None], MISSING)
    hidden: list[Tensor] = []
    for index, layer in enumerate(encoder.layers):
        values = _layer(cast(EncoderLayer, layer), values, missing)
        if index in hidden_layers:
            hidden.append(values)
    return values, lengths, missing, hidden


def _layer(layer: EncoderLayer, values: Tensor, missing: Tensor) -> Tensor:
    normed = normal(values, layer.self_attn_layer_norm)
    mixed = attended(layer.self_attn, normed, *keys_and_values(layer.self_attn, normed), missing)
    values = values + layer.dropout(mixed)
    inner = functional.gelu(linear(normal(values, layer.final_layer_norm), layer.fc1))
    out: Tensor = values + layer.dropout(linear(inner, layer.fc2))
    return out


def keys_and_values(module: Attention, source: Tensor) -> tuple[Tensor, Tensor]:
    """Of a source (batch, n, width), each (batch, heads, n, width / heads)."""
    key, value = linear(source, module.k_proj), linear(source, module.v_proj)
    return _split(key, module.heads), _split(value, module.heads)


def _split(values: Tensor, heads: int) -> Tensor:
    batch, count, width = values.shape
    return values.view(batch, count, heads, width // heads).transpose(1, 2)


def attended(module: Attention, values: Tensor, keys: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
    """Attention of `values` (batch, queries, width) over what `keys_and_values` gave.

    `bias` is added to the scores (batch, heads, queries, n).
    """
    batch, heads, _, size = keys.shape
    count = values.shape[1]
    query = _split(linear(values, module.q_proj) * size**-0.5, heads).reshape(batch * heads, count, size)
    scores = query @ keys.reshape(batch * heads, -1, size).transpose(1, 2)
    scores = scores.view(batch, heads, count, -1) + bias
    mixed = scores.flatten(0, 1).softmax(dim=-1) @ memory.reshape(batch * heads, -1, size)
    joined = mixed.view(batch, heads, count, size).transpose(1, 2).reshape(batch, count, heads * size)
    return linear(joined, module.out_proj)


class FastWhisper(nn.Module):
    """Normalised features in, log-probabilities out."""

    def __init__(self, model: WhisperCtc) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, lengths: Tensor, hidden_layers: tuple[int, ...] = ()) -> CtcOutput:
        """Features (batch, frames, bands), zero beyond lengths -> log-probs, layers' outputs (B,T,C)."""
        values, lengths, _, hidden = fast_encoder(self.model.encoder, features, lengths, hidden_layers)
        head: Any = self.model.ctc_head
        first, _, norm, last = head
        inner = functional.gelu(linear(normal(values, self.model.encoder.layer_norm), first))
        logits = linear(normal(inner, norm), last).float()
        return CtcOutput(functional.log_softmax(logits, dim=-1), lengths, hidden)
