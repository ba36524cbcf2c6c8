"""Fine-tune a Whisper with its decoder, and serve it as one graph with greedy search inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from training.config import RunConfig, Section
from training.errors import ConfigError
from training.inference import LogProbs, spoken
from training.loop.dataset import Batch
from training.loop.module import SpeechModule
from training.loop.settings import TrainingSettings
from training.masks import frame_mask
from training.pretrained import config_from_hub, fill, model_from_hub
from training.recipes.whisper_ctc.model import MAX_WINDOW_S, MIN_SAMPLES, EncoderConfig
from training.recipes.whisper_seq2seq.export import FRAME_STRIDE_S, export_graph
from training.recipes.whisper_seq2seq.model import DecoderConfig, Prompt, WhisperSeq2Seq
from training.stages.recipe import Facts, Recipe, Waveforms
from training.tokenizer import ByteLevelCodec, load_tokenizer
from training.transformer_quantize import decoder_candidates
from training.vocabulary import TokenCodec

IGNORED = -100
ENGLISH_OUTPUTS = 51_864


class WhisperSeq2SeqSettings(Section):
    """The `model` section."""

    base: str = Field(
        default="openai/whisper-small", description="Whisper checkpoint: a folder, or its hub name."
    )
    revision: str | None = Field(default=None, description="Commit of the hub checkpoint.")
    frozen_encoder: bool = Field(default=False, description="Only the decoder learns.")
    length: Literal["true", "fixed30"] = Field(
        default="fixed30",
        description="Run on 30 padded seconds, as Whisper was trained, or on the audio's own length, which "
        "published weights answer with text without end.",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1)


class Seq2SeqModule(SpeechModule):
    """Teacher forcing for training, greedy search for validation."""

    model: WhisperSeq2Seq

    def __init__(self, model: WhisperSeq2Seq, codec: TokenCodec, settings: TrainingSettings) -> None:
        super().__init__(model, settings)
        self.codec = codec

    def loss_and_texts(self, batch: Batch, *, decode: bool) -> tuple[Tensor, list[str]]:
        """Cross-entropy per token of text and end, and greedy hypotheses."""
        tokens, labels = teacher_tokens(batch["targets"], batch["target_lengths"], self.model.prompt)
        logits = self.model.logits(batch["waveform"], batch["lengths"], tokens)
        loss = functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED)
        if not decode:
            return loss, []
        steps, found, _ = self.model.generate(batch["waveform"], batch["lengths"])
        best = steps.argmax(dim=-1).tolist()
        decoded = zip(best, found.tolist(), strict=True)
        return loss, [self.codec.vocabulary.decode(ids[:count]) for ids, count in decoded]


def teacher_tokens(targets: Tensor, lengths: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """What the decoder sees and what it should say next.

    Args:
        targets: (batch, tokens) int64 of text, padded with anything.
        lengths: (batch,) int64.
        prompt: start tokens and end.

    Returns two (batch, prompt + tokens) int64: tokens, and labels with IGNORED where nothing is learned.
    """
    batch, longest = targets.shape
    size = len(prompt.ids)
    whole = torch.full((batch, size + longest + 1), prompt.end, device=targets.device)
    whole[:, :size] = torch.tensor(prompt.ids, device=targets.device)
    whole[:, size : size + longest] = torch.where(frame_mask(lengths, longest), targets, prompt.end)
    position = torch.arange(size + longest, device=targets.device)[None, :]
    learned = (position >= size - 1) & (position < size + lengths[:, None])
    return whole[:, :-1], torch.where(learned, whole[:, 1:], IGNORED)


class WhisperSeq2SeqRecipe(Recipe):
    """Whisper with its decoder, from recordings to a bundle with greedy search in the graph."""

    name = "whisper_seq2seq"
    settings_type = WhisperSeq2SeqSettings
    settings: WhisperSeq2SeqSettings

    @classmethod
    def of_base(cls, base: str, language: str) -> WhisperSeq2SeqRecipe:
        """For a published network as it is, without recordings."""
        settings = {
            "name": "published",
            "language": language,
            "data": {"manifest": "none"},
            "model": {"base": base},
            "bundle": {"licence": ""},
        }
        return cls(RunConfig.model_validate(settings))

    def _tokenizer(self) -> Any:
        return load_tokenizer(self.settings.base, self.settings.revision)

    def _prompt(self, codec: ByteLevelCodec, generation: Any) -> Prompt:
        """`generation`: the checkpoint's GenerationConfig. Raises ConfigError."""
        base, language = self.settings.base, self.config.language
        names = [f"<|{language}|>", "<|transcribe|>"]
        if not _multilingual(generation, self._config.vocab_size):
            if language != "en":
                raise ConfigError(f"{base} knows English only, not {language}")
            names = []  # its tokenizer has these tokens, but it never saw them
        names = ["<|startoftranscript|>", *names, "<|notimestamps|>"]
        known = codec.tokenizer.get_vocab()
        if missing := [name for name in names if name not in known]:
            raise ConfigError(f"the tokenizer of {base} has no {missing[0]}")
        end = codec.vocabulary.blank_id
        outputs = range(self._config.vocab_size)
        said, first = (
            {token for token in given or () if token in outputs}
            for given in (generation.suppress_tokens, generation.begin_suppress_tokens)
        )
        control = codec.vocabulary.special_ids | said
        return Prompt(
            tuple(known[name] for name in names),
            end,
            tuple(sorted(control - {end})),
            tuple(sorted(first - {end})),  # a text may be empty
        )

    def codec(self) -> ByteLevelCodec:
        """The checkpoint's tokenizer; the end of text is the bundle's blank."""
        tokenizer = self._tokenizer()
        return ByteLevelCodec(tokenizer, self._config.vocab_size, blank_id=int(tokenizer.eos_token_id))

    @cached_property
    def _config(self) -> Any:
        """Read once: `room` is asked for every recording, and the hub may be asked on every reading."""
        from transformers import WhisperConfig

        return config_from_hub(WhisperConfig, self.settings.base, self.settings.revision, "whisper")

    @cached_property
    def _end(self) -> int:
        """Asked for every output that is compared, and a tokenizer takes a while to load."""
        return self.codec().vocabulary.blank_id

    def facts(self) -> Facts:
        """40 ms per frame, of which at most every second holds a token."""
        return Facts(
            frame_stride_s=FRAME_STRIDE_S,
            max_window_s=MAX_WINDOW_S,
            min_samples=MIN_SAMPLES,
            longest_s=MAX_WINDOW_S,
            padded_s=MAX_WINDOW_S if self.settings.length == "fixed30" else None,
            decoder=True,
        )

    def room_needed(self, ids: Sequence[int]) -> int:
        """One place per token."""
        return len(ids)

    def room(self, samples: int) -> int:
        """Half of the frames, and never more than the decoder's positions less prompt and end."""
        return min(super().room(samples) // 2, int(self._config.max_target_positions) - 5)

    def _published(self) -> Any:
        from transformers import WhisperForConditionalGeneration

        settings = self.settings
        return model_from_hub(WhisperForConditionalGeneration, settings.base, settings.revision, "whisper")

    def network(self, codec: TokenCodec) -> WhisperSeq2Seq:
        """The base with all its weights."""
        base = self._published()
        network = WhisperSeq2Seq(
            EncoderConfig.from_transformers(base.config),
            DecoderConfig.from_transformers(
                base.config, getattr(base.generation_config, "alignment_heads", None)
            ),
            self._prompt(self.codec(), base.generation_config),
            fixed=self.settings.length == "fixed30",
            dropout=self.settings.dropout,
            augment=self.config.augment.features if self.config.augment else None,
        )
        state = {name.removeprefix("model."): value for name, value in base.state_dict().items()}
        fill(network, {name: value for name, value in state.items() if name != "proj_out.weight"})
        network.encoder.requires_grad_(not self.settings.frozen_encoder)
        return network

    def module(self, network: nn.Module, codec: TokenCodec) -> SpeechModule:
        """Teacher forcing."""
        return Seq2SeqModule(_checked(network), codec, self.config.training)

    def compared(self, log_probs: LogProbs) -> LogProbs:
        """The tokens, wherever they stand."""
        return spoken(log_probs, self._end)

    def export(self, network: nn.Module) -> onnx.ModelProto:
        """Front end, encoder and greedy search in one graph."""
        return export_graph(_checked(network))

    def quantized(self, graph: Path, out: Path, calibration: Waveforms) -> Iterator[tuple[str, Path]]:
        """Dynamic INT8 on the matrix products of encoder and decoder, with and without the output layer."""
        return decoder_candidates(graph, out, calibration)

    def save_model(self, network: nn.Module, folder: Path) -> Path:
        """The fine-tuned weights in `transformers`' form, with tokenizer and feature extractor."""
        from transformers import WhisperFeatureExtractor

        base = self._published()
        state = {f"model.{name}": value for name, value in _checked(network).state_dict().items()}
        state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
        base.load_state_dict(state)
        base.save_pretrained(folder)
        self._tokenizer().save_pretrained(folder)
        WhisperFeatureExtractor(feature_size=base.config.num_mel_bins).save_pretrained(folder)  # type: ignore[no-untyped-call]
        return folder


def _multilingual(generation: Any, outputs: int) -> bool:
    """What the checkpoint says, or else whether it has the 51,864 outputs of Whisper's English models."""
    said = getattr(generation, "is_multilingual", None)
    return outputs != ENGLISH_OUTPUTS if said is None else bool(said)


def _checked(network: nn.Module) -> WhisperSeq2Seq:
    if not isinstance(network, WhisperSeq2Seq):
        raise TypeError(f"expected WhisperSeq2Seq, got {type(network).__name__}")
    return network
