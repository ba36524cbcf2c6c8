"""Whisper with its decoder (Radford et al. 2022), and how its text becomes frames of log-probabilities.

Serving knows one contract: a waveform goes in, frames of log-probabilities come out, repeats collapse and
blanks vanish. A decoder fits it: each token that greedy search finds becomes one frame, frames of certain
blank stand between, and collapsing gives back the tokens. The tokens are spread evenly over the audio, so
word times of this family are estimates, nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.augment.spectrogram import SpecAugment, SpecAugmentConfig
from training.recipes.whisper_ctc.frontend import WhisperLogMel
from training.recipes.whisper_ctc.model import EncoderConfig, WhisperEncoder
from training.transformer import Attention, key_bias

IMPOSSIBLE = -1e4
"""Log-probability of every token but the blank in a frame between tokens; its exponential is zero."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a Whisper decoder."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    inner: int
    positions: int = 448

    @classmethod
    def from_transformers(cls, config: Any) -> DecoderConfig:
        """From a `transformers.WhisperConfig`."""
        return cls(
            vocabulary=config.vocab_size,
            width=config.d_model,
            layers=config.decoder_layers,
            heads=config.decoder_attention_heads,
            inner=config.decoder_ffn_dim,
            positions=config.max_target_positions,
        )


@dataclass(frozen=True)
class Prompt:
    """Tokens that every decoding starts with, and those that end it or may not appear."""

    ids: tuple[int, ...]
    """Start of transcript, language and task where the model knows several, no timestamps."""
    end: int
    suppressed: tuple[int, ...]
    """Control tokens, the end not among them, and what the checkpoint says is no speech."""
    suppressed_first: tuple[int, ...] = ()
    """What the text may not begin with."""


class DecoderLayer(nn.Module):
    """Attention on earlier tokens, attention on the audio, feed-forward."""

    def __init__(self, config: DecoderConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.self_attn = Attention(config.width, config.heads, key_bias=False)
        self.self_attn_layer_norm = nn.LayerNorm(config.width)
        self.encoder_attn = Attention(config.width, config.heads, key_bias=False)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.inner)
        self.fc2 = nn.Linear(config.inner, config.width)
        self.final_layer_norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Tensor, causal: Tensor, audio: Tensor, audio_bias: Tensor | None) -> Tensor:
        """(batch, tokens, width) -> the same."""
        values = values + self.dropout(self.self_attn(self.self_attn_layer_norm(values), causal))
        heard = self.encoder_attn(self.encoder_attn_layer_norm(values), audio_bias, audio)
        values = values + self.dropout(heard)
        inner = functional.gelu(self.fc1(self.final_layer_norm(values)))
        out: Tensor = values + self.dropout(self.fc2(inner))
        return out


class WhisperDecoder(nn.Module):
    """Tokens so far and audio -> what comes next; the output layer is the embedding's transpose."""

    def __init__(self, config: DecoderConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.embed_positions = nn.Embedding(config.positions, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, dropout) for _ in range(config.layers))
        self.layer_norm = nn.LayerNorm(config.width)

    def forward(
        self, tokens: Tensor, audio: Tensor, audio_bias: Tensor | None, *, last: bool = False
    ) -> Tensor:
        """(batch, tokens) int64, (batch, frames, width) -> logits (batch, tokens, vocabulary).

        With `last` those after the last token only, (batch, 1, vocabulary).
        """
        count = tokens.shape[1]
        values = self.embed_tokens(tokens) + self.embed_positions.weight[:count]
        causal = torch.full((count, count), -1e9, device=tokens.device).triu(1)
        for layer in self.layers:
            values = layer(values, causal, audio, audio_bias)
        values = values[:, -1:] if last else values
        return functional.linear(self.layer_norm(values), self.embed_tokens.weight)


class WhisperSeq2Seq(nn.Module):
    """Front end, encoder, decoder."""

    suppress: Tensor

    def __init__(
        self,
        encoder: EncoderConfig,
        decoder: DecoderConfig,
        prompt: Prompt,
        *,
        fixed: bool = False,
        dropout: float = 0.0,
        augment: SpecAugmentConfig | None = None,
    ) -> None:
        super().__init__()
        self.prompt = prompt
        self.fixed = fixed
        self.frontend = WhisperLogMel(encoder.bands, fixed=fixed)
        self.augment = SpecAugment(augment) if augment else None
        self.encoder = WhisperEncoder(encoder, dropout)
        self.decoder = WhisperDecoder(decoder, dropout)
        suppress = torch.zeros(2, decoder.vocabulary)  # after the first text token, and before it
        suppress[:, list(prompt.suppressed)] = -1e9
        suppress[1, list(prompt.suppressed_first)] = -1e9
        self.register_buffer("suppress", suppress, persistent=False)

    def listen(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Audio states (batch, frames, width), frames per item, and the bias of attention over them."""
        with torch.autocast(waveform.device.type, enabled=False):
            features, counts = self.frontend(waveform.float(), lengths)
        if self.augment is not None:
            features = self.augment(features.transpose(1, 2), counts).transpose(1, 2)
        hidden, counts = self.encoder(features, counts, fixed=self.fixed)
        return hidden, counts, None if self.fixed else key_bias(counts, hidden.shape[1])

    def logits(self, waveform: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        """What follows each of the given tokens, (batch, tokens, vocabulary); for training."""
        hidden, _, bias = self.listen(waveform, lengths)
        out: Tensor = self.decoder(tokens, hidden, bias)
        return out

    def generate(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy search.

        Returns log_probs (batch, steps, vocabulary) of every step after the prompt, the number of text tokens
        per item (batch,), and output frames per item (batch,), one per 40 ms; an item has at most one token
        per two frames.
        """
        hidden, counts, bias = self.listen(waveform, lengths)
        frames = torch.div(counts + 1, 2, rounding_mode="floor")
        limit = torch.div(frames, 2, rounding_mode="floor")
        room = self.decoder.config.positions - len(self.prompt.ids)
        batch = len(lengths)
        tokens = torch.tensor([self.prompt.ids] * batch, device=waveform.device)
        open_items = torch.ones(batch, dtype=torch.bool, device=waveform.device)
        found = torch.zeros(batch, dtype=torch.int64, device=waveform.device)
        steps = []
        for step in range(min(int(limit.max()) + 1, room)):
            logits = self.decoder(tokens, hidden, bias, last=True)[:, 0] + self.suppress[int(step == 0)]
            log_probs = functional.log_softmax(logits.float(), dim=-1)
            steps.append(log_probs)
            best = log_probs.argmax(dim=-1)
            open_items = open_items & (best != self.prompt.end) & (step < limit)
            found += open_items
            if not open_items.any():
                break
            tokens = torch.cat([tokens, best[:, None]], dim=1)
        return torch.stack(steps, dim=1), found, frames

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, samples), (batch,) -> log_probs (batch, frames, vocabulary), frame lengths (batch,)."""
        steps, found, frames = self.generate(waveform, lengths)
        return spread(steps, found, frames, self.prompt.end), frames


def spread(steps: Tensor, found: Tensor, frames: Tensor, blank_id: int) -> Tensor:
    """Token i of n stands at frame floor(i * frames / n); every other frame is a certain blank.

    Args:
        steps: (batch, steps, vocabulary) log-probabilities.
        found: (batch,) int64, tokens per item, at most half its frames: so no two tokens are neighbours.
        frames: (batch,) int64.
        blank_id: the end of text, which is the bundle's blank.
    """
    batch, count, vocabulary = steps.shape
    frame = torch.arange(int(frames.max()), device=steps.device)[None, :]
    n, total = found[:, None], frames[:, None]
    index = torch.div(frame * n + total - 1, total, rounding_mode="floor")
    place = torch.div(index * total, n.clamp(min=1), rounding_mode="floor")
    hit = (place == frame) & (index < n)
    gathered = steps.gather(1, index.clamp(max=count - 1)[:, :, None].expand(batch, -1, vocabulary))
    blank = torch.full((vocabulary,), IMPOSSIBLE, device=steps.device)
    blank[blank_id] = 0.0
    return torch.where(hit[:, :, None], gathered, blank)
