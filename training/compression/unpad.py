"""Stage 3a: the encoder learns to hear a clip's own length as the large one hears it before silence.

    python -m training.compression.unpad --base BASE --cache CACHE --labels LABELS --run RUN --max-minutes 30

Whisper learned on 30 s windows, and an encoder that is given no more than the clip answers something else:
its attention never had to do without the silence behind the speech. Here every utterance of the cache, with
a text or without, is heard by the published encoder with silence after it, and the small one learns to
answer the same for the clip alone. Nothing else is learned, so nothing is forgotten; `train --init-from
RUN/last.pt` goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from training.compression.corpus import LabelledCorpus, Sound, SoundMaker
from training.compression.network import decoder_layers, listen
from training.compression.train import (
    CorpusLearner,
    TrainConfig,
    add_run_options,
    config_like,
    new_network,
    read_state,
    run_as_told,
    told_by,
    until_when,
    validated,
)
from training.distillation.learner import adamw
from training.errors import in_one_line
from training.masks import frame_mask
from training.recipes.whisper_seq2seq.model import WhisperSeq2Seq

SILENCE_FRAMES = 800
"""After what the published encoder hears: as good as 30 s (docs/experiments.md)."""
MEASURED_BATCHES = 4
"""From which the sizes of keys and values are taken."""


@dataclass(frozen=True)
class UnpadConfig(TrainConfig):
    """What a run needs to know; stored with its checkpoints, where `train` looks for the layers."""

    layers: tuple[int, ...] = (0, 1, 2, 3)
    rounded: bool = False
    batch_s: float = 25.0
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup_steps: int = 60
    ema_steps: int = 60


def silence_after(features: Tensor, lengths: Tensor, frames: int, most: int) -> tuple[Tensor, Tensor]:
    """Features (batch, frames, bands) and lengths (batch,) with up to `frames` of digital silence, to `most`.

    Silence is what every band has that is 8 powers of ten below an item's loudest: one less than that on
    Whisper's scale is two below it, for the scale has four to one.
    """
    longer = (lengths + frames).clamp(max=max(most, int(lengths.max())))
    room = functional.pad(features, (0, 0, 0, max(0, int(longer.max()) - features.shape[1])))
    own = frame_mask(lengths, room.shape[1])
    added = frame_mask(longer, room.shape[1]) & ~own
    loudest = torch.where(own[:, :, None], room, -math.inf).amax(dim=(1, 2))
    return torch.where(added[:, :, None], (loudest - 2.0)[:, None, None], room), longer


def metric(network: WhisperSeq2Seq, states: Tensor) -> Tensor:
    """What a difference of two states costs the decoder: a factor L (width, width) for ``|(a - b) L|^2``.

    The mean of the squared errors of the keys and of the values of each of its layers, and of the states
    themselves, each in units of its variance over `states` (frames, width). One where a - b is as large as a
    state is wont to differ from the mean.
    """
    width = states.shape[1]
    covariance = torch.cov(states.T)
    total = torch.eye(width) / covariance.trace()
    attentions = [layer.encoder_attn for layer in decoder_layers(network)]
    projections = [projection for each in attentions for projection in (each.k_proj, each.v_proj)]
    for projection in projections:
        weight = projection.weight.detach()
        product = weight.T @ weight
        total += product / (product * covariance).sum()
    factor: Tensor = torch.linalg.cholesky(total / (len(projections) + 1))
    return factor


class Unpadder(CorpusLearner[Sound]):
    """The encoder that is given clips alone, the published one, and the learning one's running average."""

    def __init__(self, config: UnpadConfig, network: WhisperSeq2Seq, corpus: LabelledCorpus) -> None:
        super().__init__(config)
        self.corpus = corpus
        self.published = copy.deepcopy(network).requires_grad_(False).eval()
        self.network = copy.deepcopy(self.published)
        self.average = copy.deepcopy(self.published)
        self.learned, self.averaged = self.network.encoder.requires_grad_(), self.average.encoder
        self.optimisers = [adamw(config, (p for p in self.learned.parameters() if p.requires_grad))]
        self.maker = SoundMaker(corpus, config.batch_s, config.seed).sound
        measured = SoundMaker(corpus, config.batch_s, config.seed)
        with torch.inference_mode():
            states = [self._published_states(measured.sound(step)) for step in range(MEASURED_BATCHES)]
        self.metric = metric(network, torch.cat([found[own] for found, own in states]).clone())

    def _published_states(self, sound: Sound) -> tuple[Tensor, Tensor]:
        """(batch, frames, width) of what is heard before silence, and which of them the items have."""
        frames = (sound.features.shape[1] + 1) // 2
        longest = 2 * self.published.encoder.config.positions
        longer = silence_after(sound.features, sound.lengths, SILENCE_FRAMES, longest)
        states, _, _ = listen(self.published, *longer)
        counts = torch.div(sound.lengths + 1, 2, rounding_mode="floor")
        return states[:, :frames].float(), frame_mask(counts, frames)

    def _loss(self, sound: Sound, progress: float) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            wanted, own = self._published_states(sound)
        found, _, _ = listen(self.network, sound.features, sound.lengths)
        difference = (found.float() - wanted)[own] @ self.metric
        loss = difference.square().sum(dim=-1).mean()
        return loss, {"error": float(loss.detach())}

    def validation(self) -> dict[str, float]:
        """Word error rates of the averaged encoder with the published decoder, per source."""
        return validated(self.average, self.corpus, self.pool)


@in_one_line("unpad")
def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="what training.compression.label was given")
    add_run_options(parser, UnpadConfig)
    arguments = parser.parse_args(given)
    deadline_s = until_when(arguments)
    torch.set_num_threads(1)
    corpus = LabelledCorpus(arguments.cache, arguments.labels)
    last = arguments.run / "last.pt"
    state = read_state(last) if last.exists() else None
    config = config_like(UnpadConfig, told_by(arguments), state["config"] if state else {}, last)
    trainer = Unpadder(config, new_network(arguments.base, arguments.language, config, corpus.cut), corpus)
    if state:
        trainer.restore(state)
        print(f"going on at step {trainer.step}")
    run_as_told(trainer, arguments, deadline_s)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
