"""Whisper with its decoder (Radford et al. 2022), and how its text becomes frames of log-probabilities.

Serving knows one contract: a waveform goes in, frames of log-probabilities come out, repeats collapse and
blanks vanish. A decoder fits it: each token that greedy search finds becomes a few equal frames, frames of
certain blank stand between, and collapsing gives back the tokens. Where a token stands is where the decoder
listened when it wrote it: some heads of its attention follow the speech.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.augment.spectrogram import SpecAugment, SpecAugmentConfig
from training.masks import frame_mask
from training.pretrained import rest_if_frozen
from training.recipes.whisper_ctc.frontend import WhisperLogMel
from training.recipes.whisper_ctc.model import EncoderConfig, WhisperEncoder
from training.transformer import Attention, key_bias

LONGEST_PHRASE = 32
"""Tokens of a phrase that is noticed when it is said again and again."""
LEAST_REPEATED = 10
"""Tokens: `ha ha ha` and ten equal digits are speech; a phrase is in a loop from its third time on."""
TOKEN_FRAMES = 5
"""A token lasts for 0.2 s at most: what it sounds like, on average (docs/experiments.md)."""
SMOOTHED = 6
SMOOTHED_PADS = (2, 3)
"""Audio frames, of which two are one output frame, over which means are taken; how many the ends lack."""
STEADY = 1e-6
"""Added to the deviation of an attention over the tokens."""
IMPOSSIBLE = -1e4
"""Log-probability of every token but the blank in a frame between tokens; its exponential is zero."""
NEVER = 2**30
"""A place beyond every frame."""


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a Whisper decoder."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    inner: int
    positions: int = 448
    alignment_heads: tuple[tuple[int, int], ...] = ()
    """Layers and heads whose attention follows the speech; none: all of the upper half of the layers."""

    def heads_of(self, layer: int) -> list[int]:
        """Those of one layer that follow the speech."""
        if self.alignment_heads:
            return sorted({head for index, head in self.alignment_heads if index == layer})
        return list(range(self.heads)) if layer >= self.layers // 2 else []

    @property
    def followers(self) -> int:
        """How many heads follow the speech."""
        return sum(len(self.heads_of(layer)) for layer in range(self.layers))

    @classmethod
    def from_transformers(cls, config: Any, alignment_heads: Any = None) -> DecoderConfig:
        """From a `transformers.WhisperConfig`, and from its generation configuration the heads."""
        return cls(
            vocabulary=config.vocab_size,
            width=config.d_model,
            layers=config.decoder_layers,
            heads=config.decoder_attention_heads,
            inner=config.decoder_ffn_dim,
            positions=config.max_target_positions,
            alignment_heads=tuple((int(layer), int(head)) for layer, head in alignment_heads or ()),
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

    def listened(self, values: Tensor, causal: Tensor, audio: Tensor, audio_bias: Tensor | None) -> Tensor:
        """Shares of the attention on the audio, (batch, heads, tokens, frames)."""
        values = values + self.self_attn(self.self_attn_layer_norm(values), causal)
        return self.encoder_attn.shares(self.encoder_attn_layer_norm(values), audio_bias, audio)


class WhisperDecoder(nn.Module):
    """Tokens so far and audio -> what comes next; the output layer is the embedding's transpose."""

    embed_scale: Tensor | None
    """(width,): what a token's row is multiplied by as an input; None of published rows, by nothing.

    So columns can be made alike for rounding (`training.equalise`): the output takes the inverse in its norm.
    """

    def __init__(self, config: DecoderConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.embed_positions = nn.Embedding(config.positions, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, dropout) for _ in range(config.layers))
        self.layer_norm = nn.LayerNorm(config.width)
        self.register_buffer("embed_scale", None)

    def forward(
        self, tokens: Tensor, audio: Tensor, audio_bias: Tensor | None, *, last: bool = False
    ) -> Tensor:
        """(batch, tokens) int64, (batch, frames, width) -> logits (batch, tokens, vocabulary).

        With `last` those after the last token only, (batch, 1, vocabulary).
        """
        values, causal = self._embedded(tokens)
        for layer in self.layers:
            values = layer(values, causal, audio, audio_bias)
        values = values[:, -1:] if last else values
        return functional.linear(self.layer_norm(values), self.embed_tokens.weight)

    def attention(self, tokens: Tensor, audio: Tensor, audio_bias: Tensor | None) -> Tensor:
        """How much is listened to each audio frame after each token: (batch, tokens, frames).

        The mean over the heads that follow the speech.
        """
        values, causal = self._embedded(tokens)
        found = torch.zeros(*tokens.shape, audio.shape[1], device=tokens.device)
        for index, module in enumerate(self.layers):
            layer = cast(DecoderLayer, module)
            if heads := self.config.heads_of(index):
                found = found + layer.listened(values, causal, audio, audio_bias)[:, heads].sum(dim=1)
            values = layer(values, causal, audio, audio_bias)
        return found / self.config.followers

    def rows_of(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> what tokens are as inputs, (..., width), without their places."""
        rows = functional.embedding(tokens, self.embed_tokens.weight)
        return rows if self.embed_scale is None else rows * self.embed_scale

    def _embedded(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer is given, and what is added to scores of later tokens."""
        count = tokens.shape[1]
        values = self.rows_of(tokens) + self.embed_positions.weight[:count]
        return values, torch.full((count, count), -1e9, device=tokens.device).triu(1)


def least_repeats(limits: Tensor) -> Tensor:
    """By the length of what is said again, how many tokens have to repeat before it is a loop.

    Two times the phrase, and ten, but in a short clip no more than half of the tokens (batch,) that it may
    have: a second has time for one word said twice, not six times. Returns (batch, LONGEST_PHRASE) int64.
    """
    twice = 2 * torch.arange(1, LONGEST_PHRASE + 1, device=limits.device)
    half = torch.div(limits, 2, rounding_mode="floor").clamp(max=LEAST_REPEATED)
    return torch.maximum(twice[None, :], half[:, None])


class Repeats(NamedTuple):
    """How long the text of each item has been saying again what it said before."""

    recent: Tensor
    """(batch, LONGEST_PHRASE) int64: the last tokens, the latest first."""
    runs: Tensor
    """(batch, LONGEST_PHRASE) int64: tokens in a row that equal the one so many places before."""

    @classmethod
    def none(cls, batch: int, device: torch.device) -> Repeats:
        """Before the first token."""
        shape = (batch, LONGEST_PHRASE)
        return cls(
            torch.full(shape, -1, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.int64, device=device),
        )

    def after(self, tokens: Tensor, least: Tensor) -> tuple[Repeats, Tensor]:
        """With one more token (batch,), and how many of the last ones are a loop: 0 where there is none.

        `least`: of :func:`least_repeats`.
        """
        runs = torch.where(self.recent == tokens[:, None], self.runs + 1, 0)
        recent = torch.cat([tokens[:, None], self.recent[:, :-1]], dim=1)
        return Repeats(recent, runs), torch.where(runs >= least, runs, 0).amax(dim=1)


class Seq2Seq(nn.Module):
    """An encoder with a decoder, and its greedy search; whoever derives from it says how it listens."""

    decoder: Any
    suppress: Tensor
    """(2, vocabulary): added to what follows the first text token, and to what comes before it."""

    def __init__(self, prompt: Prompt, vocabulary: int) -> None:
        super().__init__()
        self.prompt = prompt
        suppress = torch.zeros(2, vocabulary)
        suppress[:, list(prompt.suppressed)] = -1e9
        suppress[1, list(prompt.suppressed_first)] = -1e9
        self.register_buffer("suppress", suppress, persistent=False)

    @property
    def most_tokens(self) -> int:
        """Of text that there are positions for."""
        raise NotImplementedError

    def listen(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Audio states (batch, frames, width), frames per item, and the bias of attention over them."""
        raise NotImplementedError

    def generate(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy search.

        Returns log_probs (batch, steps, vocabulary) of every step after the prompt, the number of text tokens
        per item (batch,), and output frames per item (batch,), one per two of the audio's; an item has
        at most one token per two of these. A text that goes round in a loop ends, and what it said again is
        no text.
        """
        steps, _, found, frames = self._search(*self.listen(waveform, lengths))
        return steps, found, frames

    def _search(
        self, hidden: Tensor, counts: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `generate`, with the tokens that were given to the steps."""
        frames = torch.div(counts + 1, 2, rounding_mode="floor")
        limit = torch.div(frames, 2, rounding_mode="floor")
        room = self.most_tokens
        batch, device = len(counts), hidden.device
        tokens = torch.tensor([self.prompt.ids] * batch, device=device)
        open_items = torch.ones(batch, dtype=torch.bool, device=device)
        found = torch.zeros(batch, dtype=torch.int64, device=device)
        repeats, least = Repeats.none(batch, device), least_repeats(limit)
        steps = []
        for step in range(min(int(limit.max()) + 1, room)):
            logits = self.decoder(tokens, hidden, bias, last=True)[:, 0] + self.suppress[int(step == 0)]
            log_probs = functional.log_softmax(logits.float(), dim=-1)
            steps.append(log_probs)
            best = log_probs.argmax(dim=-1)
            open_items = open_items & (best != self.prompt.end) & (step < limit)
            repeats, repeated = repeats.after(best, least)
            found -= torch.where(open_items & (repeated > 0), repeated - 1, 0)
            open_items = open_items & (repeated == 0)
            found += open_items
            if not open_items.any():
                break
            tokens = torch.cat([tokens, best[:, None]], dim=1)
        return torch.stack(steps, dim=1), tokens, found, frames

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, samples), (batch,) -> log_probs (batch, frames, vocabulary), frame lengths (batch,)."""
        hidden, counts, bias = self.listen(waveform, lengths)
        steps, tokens, found, frames = self._search(hidden, counts, bias)
        first = len(self.prompt.ids) - 1
        heard = self.decoder.attention(tokens, hidden, bias)[:, first : first + steps.shape[1]]
        places = places_of(heard, found, counts)
        return spread(steps, places, found, frames, self.prompt.end), frames


class WhisperSeq2Seq(Seq2Seq):
    """Front end, encoder, decoder."""

    decoder: WhisperDecoder

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
        super().__init__(prompt, decoder.vocabulary)
        self.fixed = fixed
        self.frontend = WhisperLogMel(encoder.bands, fixed=fixed)
        self.augment = SpecAugment(augment) if augment else None
        self.encoder = WhisperEncoder(encoder, dropout)
        self.decoder = WhisperDecoder(decoder, dropout)

    @property
    def most_tokens(self) -> int:
        """Of text that there are positions for."""
        return self.decoder.config.positions - len(self.prompt.ids)

    def train(self, mode: bool = True) -> Self:
        """Training mode; an encoder that does not learn stays in evaluation mode."""
        super().train(mode)
        rest_if_frozen(self.encoder)
        return self

    def listen(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Audio states (batch, frames, width), frames per item, and the bias of attention over them."""
        with torch.autocast(waveform.device.type, enabled=False):
            features, counts = self.frontend(waveform.float(), lengths)
        if self.augment is not None:
            features = self.augment(features.transpose(1, 2), counts).transpose(1, 2)
        hidden, counts = self.encoder(features, counts, fixed=self.fixed)
        return hidden, counts, None if self.fixed else key_bias(counts, hidden.shape[1])

    def audio_of(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Audio states of features, and the bias of attention over them."""
        hidden, counts = self.encoder(features, lengths, fixed=self.fixed)
        return hidden, None if self.fixed else key_bias(counts, hidden.shape[1])

    def logits(self, waveform: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        """What follows each of the given tokens, (batch, tokens, vocabulary); for training."""
        hidden, _, bias = self.listen(waveform, lengths)
        out: Tensor = self.decoder(tokens, hidden, bias)
        return out


def places_of(heard: Tensor, found: Tensor, counts: Tensor) -> Tensor:
    """In which output frame each token begins: (batch, steps) int64, meaningful for the first `found` ones.

    A token is where its attention is most above that of the item's other tokens (as Radford et al. align
    words), smoothed over three output frames. One whose place runs against the order of more tokens than
    theirs do on average (a full stop that listens to the beginning of the clip) has none of its own. Of
    other places against the order, the middle is taken between the last later and the first earlier one, as
    for tokens without a place, and every token gets two frames at least.

    Args:
        heard: (batch, steps, audio frames), the attention after each token's predecessor.
        found: (batch,) int64, tokens per item, at most half its output frames.
        counts: (batch,) int64, audio frames per item; two of them are one output frame.
    """
    steps, audio = heard.shape[1:]
    valid = frame_mask(found, steps)
    own = valid[:, :, None].to(heard.dtype)
    number = found.clamp(min=1)[:, None].to(heard.dtype)
    mean = (heard * own).sum(dim=1) / number
    away = heard - mean[:, None]
    deviation = ((away * away * own).sum(dim=1) / number).sqrt()
    above = away / (deviation[:, None] + STEADY) + heard  # a token alone is above nothing
    inside = frame_mask(counts, audio)[:, None].to(heard.dtype)
    frames = torch.div(counts + 1, 2, rounding_mode="floor")
    smooth = _pooled(above * inside) / _pooled(inside).clamp(min=STEADY)
    outside = ~frame_mask(frames, smooth.shape[-1])[:, None]
    best = smooth.masked_fill(outside, IMPOSSIBLE).argmax(dim=-1)
    order = torch.arange(steps, device=heard.device)
    before = order[None, :] <= order[:, None]
    crossed = (best[:, None, :] > best[:, :, None]) & before
    crossed = (crossed | crossed.transpose(1, 2)) & valid[:, :, None] & valid[:, None, :]
    times = crossed.sum(dim=-1)
    kept = valid & (times * times <= (crossed * times[:, None, :]).sum(dim=-1))
    early = torch.where(before & kept[:, None, :], best[:, None, :], -NEVER).amax(dim=-1)
    late = torch.where(before.T & kept[:, None, :], best[:, None, :], NEVER).amin(dim=-1)
    early, late = torch.where(early < 0, late, early), torch.where(late == NEVER, early, late)
    middle = torch.div(early + late, 2, rounding_mode="floor") - 2 * order
    apart = torch.where(before & valid[:, None, :], middle[:, None, :], -NEVER).amax(dim=-1) + 2 * order
    latest = frames[:, None] - 1 - 2 * (found[:, None] - 1 - order)
    return torch.minimum(apart, latest)


def _pooled(values: Tensor) -> Tensor:
    """Means over three output frames, which are six audio frames, at every output frame."""
    return functional.avg_pool1d(functional.pad(values, SMOOTHED_PADS), SMOOTHED, stride=2)


def spread(steps: Tensor, places: Tensor, found: Tensor, frames: Tensor, blank_id: int) -> Tensor:
    """Each token for `TOKEN_FRAMES` frames, fewer where the next one begins; all others are certain blanks.

    Args:
        steps: (batch, steps, vocabulary) log-probabilities.
        places: (batch, steps) int64, rising by two or more.
        found: (batch,) int64, tokens per item.
        frames: (batch,) int64.
        blank_id: the end of text, which is the bundle's blank.
    """
    batch, count, vocabulary = steps.shape
    frame = torch.arange(int(frames.max()), device=steps.device)[None, :]
    starts = torch.where(frame_mask(found, count), places, 2**30)
    index = (starts[:, None, :] <= frame[:, :, None]).sum(dim=-1) - 1
    following = functional.pad(starts, (0, 1), value=2**30)
    start, after = (following.gather(1, (index + one).clamp(min=0)) for one in (0, 1))
    shown = (index >= 0) & (frame < start + TOKEN_FRAMES) & (frame < torch.maximum(after - 1, start + 1))
    gathered = steps.gather(1, index.clamp(min=0)[:, :, None].expand(batch, -1, vocabulary))
    blank = torch.full((vocabulary,), IMPOSSIBLE, device=steps.device)
    blank[blank_id] = 0.0
    return torch.where(shown[:, :, None], gathered, blank)
