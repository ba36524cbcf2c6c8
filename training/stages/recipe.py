"""What a recipe gives to the stages. Everything else is shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx
from torch import nn

from training.config import RunConfig, Section, check
from training.errors import ConfigError
from training.inference import LogProbs
from training.loop.module import CtcModule, SpeechModule
from training.text import Normaliser, alphabet, normaliser
from training.vocabulary import CharacterCodec, TokenCodec, ctc_frames_needed

Waveforms = Sequence[npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Facts:
    """What the stages and the bundle must know of a network before it is built."""

    frame_stride_s: float
    max_window_s: float
    min_samples: int
    sample_rate_hz: int = 16_000
    longest_s: float | None = None
    """Longest recording that the network can hear at all; None: any."""
    padded_s: float | None = None
    """What the network pads every recording to; None: the longest of its batch."""
    decoder: bool = False
    """Whether the graph searches with a decoder network."""


class Recipe:
    """One way to a model. Subclasses say which network, how it is exported and how it is quantized."""

    name: ClassVar[str]
    settings_type: ClassVar[type[Section]] = Section

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.settings = check(self.settings_type, config.model, "model")

    def normaliser(self) -> Normaliser:
        """The text normaliser of the configuration's language."""
        config = self.config
        return normaliser(config.language, yo=not config.fold_yo, letters=config.letters)

    def codec(self) -> TokenCodec:
        """Characters of the language; recipes with a tokenizer say otherwise. Raises ConfigError."""
        try:
            letters = self.config.letters or alphabet(self.config.language)
            if self.config.fold_yo and not self.config.letters:
                letters = letters.replace("ё", "")
            return CharacterCodec(letters)
        except ValueError as error:
            raise ConfigError(f"letters: {error}; list the letters of the language there") from error

    def facts(self) -> Facts:
        """Frame stride, window, shortest input."""
        raise TypeError(f"{type(self).__name__} must state its facts")

    def check_rate(self, archive_hz: int) -> None:
        """Raises ConfigError where `model.transfer_from` names a network for another sample rate."""
        read_hz = self.facts().sample_rate_hz
        if archive_hz != read_hz:
            raise ConfigError(
                f"model.transfer_from: the archive hears {archive_hz} Hz, recordings are read at {read_hz} Hz"
            )

    def room_needed(self, ids: Sequence[int]) -> int:
        """How much of `room` a text takes: for CTC a frame per token and one between equal neighbours."""
        return ctc_frames_needed(ids)

    def room(self, samples: int) -> int:
        """What a recording has room for: its frames. A text that needs more is dropped."""
        facts = self.facts()
        return int(samples / (facts.frame_stride_s * facts.sample_rate_hz))

    def network(self, codec: TokenCodec) -> nn.Module:
        """A new network, with the weights that training starts from.

        For CTC: forward takes waveform (batch, samples) and lengths (batch,), and gives log_probs
        (batch, frames, vocabulary) and frame_lengths (batch,). Raises CheckpointError.
        """
        raise TypeError(f"{type(self).__name__} must build a network")

    def module(self, network: nn.Module, codec: TokenCodec) -> SpeechModule:
        """What trains the network."""
        return CtcModule(network, codec, self.config.training)

    def compared(self, log_probs: LogProbs) -> LogProbs:
        """What of an output has to be the same in two forms of the network: (rows, vocabulary)."""
        return log_probs

    def export(self, network: nn.Module) -> onnx.ModelProto:
        """The bundle's float32 graph."""
        raise TypeError(f"{type(self).__name__} must export its network")

    def quantized(self, graph: Path, out: Path, calibration: Waveforms) -> Iterator[tuple[str, Path]]:
        """Candidates for INT8: (how, file); the stage measures them and keeps the best that passes.

        Args:
            graph: the float32 graph's file.
            out: folder for the candidates.
            calibration: recordings to measure activations on, each (samples,) float32.
        """
        raise TypeError(f"{type(self).__name__} must quantize its graph")
