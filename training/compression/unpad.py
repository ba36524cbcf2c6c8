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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.compression.corpus import LabelledCorpus, Sound, SoundMaker
from training.compression.network import decoder_layers, listen
from training.compression.train import (
    TrainConfig,
    add_run_options,
    config_of,
    described,
    new_network,
    read_state,
    run_as_told,
    until_when,
    validated,
)
from training.distillation.trainer import AVERAGE_EVERY, adamw, learning_rate, move_average
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


class Unpadder:
    """The encoder that is given clips alone, the published one, and the learning one's running average."""

    def __init__(self, config: UnpadConfig, network: WhisperSeq2Seq, corpus: LabelledCorpus) -> None:
        torch.manual_seed(config.seed)
        self.config, self.corpus = config, corpus
        self.published = copy.deepcopy(network).requires_grad_(False).eval()
        self.network = copy.deepcopy(self.published)
        self.network.encoder.requires_grad_()
        self.average = copy.deepcopy(self.published)
        self.optimiser = adamw(config, self._learned())
        self.pool = ThreadPoolExecutor(config.workers, initializer=torch.set_num_threads, initargs=(1,))
        self.maker = SoundMaker(corpus, config.batch_s, config.seed)
        self.step, self.elapsed_s, self.audio_s, self.best_wer = 0, 0.0, 0.0, math.inf
        measured = SoundMaker(corpus, config.batch_s, config.seed)
        with torch.inference_mode():
            states = [self._published_states(measured.sound(step)) for step in range(MEASURED_BATCHES)]
        self.metric = metric(network, torch.cat([found[own] for found, own in states]).clone())

    def _learned(self) -> Iterator[Tensor]:
        return (p for p in self.network.encoder.parameters() if p.requires_grad)

    def _published_states(self, sound: Sound) -> tuple[Tensor, Tensor]:
        """(batch, frames, width) of what is heard before silence, and which of them the items have."""
        frames = (sound.features.shape[1] + 1) // 2
        longest = 2 * self.published.encoder.config.positions
        longer = silence_after(sound.features, sound.lengths, SILENCE_FRAMES, longest)
        states, _, _ = listen(self.published, *longer)
        counts = torch.div(sound.lengths + 1, 2, rounding_mode="floor")
        return states[:, :frames].float(), frame_mask(counts, frames)

    def batches(self, step: int) -> list[Sound]:
        """One per worker."""
        workers = self.config.workers
        return [self.maker.sound(step * workers + worker) for worker in range(workers)]

    def _backward(self, sound: Sound) -> float:
        """Adds the gradients of one batch; runs in a worker thread."""
        with torch.no_grad():
            wanted, own = self._published_states(sound)
        found, _, _ = listen(self.network, sound.features, sound.lengths)
        difference = (found.float() - wanted)[own] @ self.metric
        loss = difference.square().sum(dim=-1).mean()
        (loss / self.config.workers).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def train_step(self, batches: list[Sound], progress: float) -> dict[str, float]:
        """One update on one batch per worker; returns the error and what it was learned with."""
        rate = learning_rate(self.config, self.step, progress)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        errors = list(self.pool.map(self._backward, batches))
        norm = torch.nn.utils.clip_grad_norm_(self._learned(), self.config.gradient_clip)
        if torch.isfinite(norm):
            self.optimiser.step()
            if self.step % AVERAGE_EVERY == 0:
                ours = self.average.encoder.parameters()
                move_average(self.config, self.step, ours, self.network.encoder.parameters())
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.audio_s += sum(sound.audio_s for sound in batches)
        return {"error": sum(errors) / len(errors), "norm": float(norm), "rate": rate}

    def validation(self) -> dict[str, float]:
        """Word error rates of the averaged encoder with the published decoder, per source."""
        return validated(self.average, self.corpus, self.pool)

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, and `train` and `rounding` to go on."""
        return {
            "config": asdict(self.config),
            "shape": described(self.network),
            "network": self.network.encoder.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "counters": [self.step, self.elapsed_s, self.audio_s, self.best_wer],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The reverse of :meth:`state`."""
        self.network.encoder.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.elapsed_s, self.audio_s, self.best_wer = state["counters"]


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
    config = config_of(UnpadConfig, arguments)
    arguments.run.mkdir(parents=True, exist_ok=True)
    corpus = LabelledCorpus(arguments.cache, arguments.labels)
    trainer = Unpadder(config, new_network(arguments.base, arguments.language, config, corpus.cut), corpus)
    last = arguments.run / "last.pt"
    if last.exists():
        trainer.restore(read_state(last))
        print(f"going on at step {trainer.step}")
    run_as_told(trainer, arguments, deadline_s)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
