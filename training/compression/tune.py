"""Stage 3c, after `rounding`: the rounded network learns to answer what it answered before it was rounded.

    python -m training.compression.tune --run RUN --cache CACHE --labels LABELS --max-minutes 25

Rounding makes up for its errors one matrix at a time; here the whole network does. It is told by the exact
one how likely every token is (Hinton et al. 2015) and moves what costs no bits: the scales of groups, biases,
normalisations, positions (Chen et al. 2024, EfficientQAT). Weights begin in the middle of their level and
move slowly, so only those whose gradient goes the same way for hundreds of steps come to another one. Leaves
a run of its own, RUN/tuned, for `publish`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.arguments import positive
from training.compression import rounding
from training.compression.corpus import IGNORED, Batch, BatchMaker, LabelledCorpus
from training.compression.network import coarse_weights, decode, heard, listen, logits
from training.compression.train import TrainConfig, described, network_of, read_state, validated
from training.distillation.runner import deadline, run_until
from training.distillation.trainer import AVERAGE_EVERY, learning_rate, move_average
from training.errors import CheckpointError, in_one_line
from training.four_bits import HIGHEST, LOWEST, as_matrix, from_matrix, integers
from training.recipes.whisper_seq2seq.model import WhisperSeq2Seq

FOLDER = "tuned"
"""In that of the run which was rounded."""


@dataclass(frozen=True)
class TuneConfig(TrainConfig):
    """What a run needs to know; stored with its checkpoints."""

    batch_s: float = 25.0
    learning_rate: float = 2e-5
    """Of biases, normalisations and positions."""
    scale_rate: float = 5e-5
    """Of scales, relative to what they were."""
    level_rate: float = 5e-4
    """Of weights, in levels."""
    warmup_steps: int = 30
    ema_steps: int = 100
    dropout: float = 0.0


class Levels:
    """A matrix of four bits that learns: (outputs, groups, GROUP) levels, (outputs, groups, 1) scales.

    The largest weight of a group stays at the lowest level, so that rounding what is served changes nothing.
    """

    def __init__(self, weight: Tensor) -> None:
        """`weight` has been rounded."""
        matrix = as_matrix(weight.detach())
        whole, self.scales = integers(matrix)
        self.shape, self.inputs = weight.shape, matrix.shape[1]
        self.pinned = (whole == LOWEST) & ((whole == LOWEST).cumsum(dim=-1) == 1)
        self.places = whole.requires_grad_()
        """Between the levels, in whole numbers at first."""
        self.growth = torch.zeros_like(self.scales).requires_grad_()
        """Natural logarithm of how much a scale has grown."""

    def whole(self) -> tuple[Tensor, Tensor]:
        """Whole numbers and scales as they are served, float32."""
        scales = (self.scales * self.growth.exp()).half().float()
        whole = self.places.round().clamp_(LOWEST, HIGHEST)
        return torch.where(self.pinned, float(LOWEST), whole), scales

    @torch.no_grad()
    def serve(self, weight: Tensor) -> None:
        """Write the values that are served into a weight."""
        whole, scales = self.whole()
        weight.copy_(from_matrix((whole * scales).flatten(1)[:, : self.inputs], self.shape))

    @torch.no_grad()
    def follow(self, gradient: Tensor) -> None:
        """Take the gradients that belong to those of the served weight, which is level times scale.

        Rounding is passed as if it were not there (the straight-through estimator, Bengio et al. 2013).
        """
        whole, scales = self.whole()
        matrix = torch.zeros(whole.flatten(1).shape)
        matrix[:, : self.inputs] = as_matrix(gradient)
        found = matrix.view_as(whole)
        self.places.grad = found * scales * ~self.pinned
        self.growth.grad = (found * whole).sum(dim=-1, keepdim=True) * scales


class Tuner:
    """The exact network, the rounded one that learns, and the running average of what is learned."""

    def __init__(
        self, config: TuneConfig, exact: WhisperSeq2Seq, network: WhisperSeq2Seq, corpus: LabelledCorpus
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.corpus = config, corpus
        self.exact = exact.requires_grad_(False).eval()
        self.network, self.average = network.eval(), copy.deepcopy(network).requires_grad_(False)
        coarse, named = coarse_weights(network), dict(network.named_parameters())
        self.levels = {name: Levels(named[name]) for name in sorted(coarse)}
        self.rest = {name: p for name, p in named.items() if name not in coarse and p.requires_grad}
        places = [levels.places for levels in self.levels.values()]
        growths = [levels.growth for levels in self.levels.values()]
        self.learned = [*self.rest.values(), *growths, *places]
        self.averages = [value.detach().clone() for value in self.learned]
        self.rates = (config.learning_rate, config.scale_rate, config.level_rate)
        groups = [{"params": list(each)} for each in (self.rest.values(), growths, places)]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.pool = ThreadPoolExecutor(config.workers, initializer=torch.set_num_threads, initargs=(1,))
        most_tokens = network.decoder.config.positions - len(network.prompt.ids)
        self.maker = BatchMaker(corpus, config.batch_s, config.seed, most_tokens, masked=False)
        self.step, self.elapsed_s, self.audio_s, self.best_wer = 0, 0.0, 0.0, math.inf

    def batches(self, step: int) -> list[Batch]:
        """One per worker."""
        workers = self.config.workers
        return [self.maker(step * workers + worker) for worker in range(workers)]

    def _answers(self, network: WhisperSeq2Seq, batch: Batch) -> Tensor:
        """Log-probabilities (tokens, vocabulary) of what follows each token of the texts."""
        audio, _, missing = listen(network, batch.features, batch.lengths)
        states = decode(network, batch.tokens, heard(network, audio), missing)
        states = states[:, len(network.prompt.ids) - 1 :]
        return logits(network, states[batch.wanted != IGNORED]).log_softmax(dim=-1)

    def _backward(self, batch: Batch) -> dict[str, float]:
        """Adds the gradients of one batch; runs in a worker thread."""
        with torch.no_grad():
            wanted = self._answers(self.exact, batch)
        found = self._answers(self.network, batch)
        divergence = (wanted.exp() * (wanted - found)).sum(dim=-1).mean()
        (divergence / self.config.workers).backward()  # type: ignore[no-untyped-call]
        same = (found.argmax(dim=-1) == wanted.argmax(dim=-1)).float().mean()
        return {"divergence": float(divergence.detach()), "same": float(same)}

    def train_step(self, batches: list[Batch], progress: float) -> dict[str, float]:
        """One update on one batch per worker; returns the parts of the loss."""
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = learning_rate(replace(self.config, learning_rate=rate), self.step, progress)
        named = dict(self.network.named_parameters())
        for name, levels in self.levels.items():
            levels.serve(named[name])
        parts = list(self.pool.map(self._backward, batches))
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.gradient_clip)
        if torch.isfinite(norm):
            for name, levels in self.levels.items():
                gradient = named[name].grad
                if gradient is not None:
                    levels.follow(gradient)
            self.optimiser.step()
            if self.step % AVERAGE_EVERY == 0:
                move_average(self.config, self.step, self.averages, self.learned)
        self.network.zero_grad(set_to_none=True)
        self.step += 1
        self.audio_s += sum(batch.audio_s for batch in batches)
        values = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        return {**values, "norm": float(norm), "rate": self.optimiser.param_groups[0]["lr"]}

    @torch.no_grad()
    def served(self) -> WhisperSeq2Seq:
        """The network of the averages, with the weights that are served."""
        own = [value.clone() for value in self.learned]
        for value, average in zip(self.learned, self.averages, strict=True):
            value.copy_(average)
        for name, value in self.average.named_parameters():
            if name in self.levels:
                self.levels[name].serve(value)
            elif name in self.rest:
                value.copy_(self.rest[name])
        for value, before in zip(self.learned, own, strict=True):
            value.copy_(before)
        return self.average

    def validation(self) -> dict[str, float]:
        """Word error rates of the averaged, rounded weights per source, on the held-out speakers."""
        return validated(self.served(), self.corpus, self.pool)

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, and what is served under "average"."""
        return {
            "config": asdict(self.config),
            "shape": described(self.network),
            "learned": [value.detach() for value in self.learned],
            "averages": self.averages,
            "average": self.served().state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "counters": [self.step, self.elapsed_s, self.audio_s, self.best_wer],
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """The reverse of :meth:`state`."""
        for ours, theirs in ((self.learned, state["learned"]), (self.averages, state["averages"])):
            for value, before in zip(ours, theirs, strict=True):
                value.copy_(before)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.elapsed_s, self.audio_s, self.best_wer = state["counters"]


@in_one_line("tune")
def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="that training.compression.rounding rounded")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--steps", type=positive)
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--batch-s", type=float, default=TuneConfig.batch_s)
    parser.add_argument("--learning-rate", type=float, default=TuneConfig.learning_rate)
    parser.add_argument("--scale-rate", type=float, default=TuneConfig.scale_rate)
    parser.add_argument("--level-rate", type=float, default=TuneConfig.level_rate)
    parser.add_argument("--workers", type=positive, default=TuneConfig.workers)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate-every-minutes", type=float, default=8.0)
    arguments = parser.parse_args(given)
    deadline_s = deadline(None, arguments.max_minutes)
    if arguments.steps is None and deadline_s is None:
        raise SystemExit("say how long: --steps or --max-minutes")
    torch.set_num_threads(1)
    rounded = read_state(arguments.run / rounding.NAME)
    if "exact" not in rounded:
        raise CheckpointError(
            f"{arguments.run / rounding.NAME}: rounded before what it was is kept; once more"
        )
    config = TuneConfig(
        layers=tuple(range(rounded["shape"]["decoder"]["layers"])),
        workers=arguments.workers,
        batch_s=arguments.batch_s,
        learning_rate=arguments.learning_rate,
        scale_rate=arguments.scale_rate,
        level_rate=arguments.level_rate,
        seed=arguments.seed,
    )
    out = arguments.run / FOLDER
    out.mkdir(exist_ok=True)
    corpus = LabelledCorpus(arguments.cache, arguments.labels)
    exact = network_of({**rounded, "average": rounded["exact"]}, corpus.cut)
    trainer = Tuner(config, exact, network_of(rounded, corpus.cut), corpus)
    if (out / "last.pt").exists():
        trainer.restore(read_state(out / "last.pt"))
        print(f"going on at step {trainer.step}")
    corpus.cut.save(out / "vocabulary.json")
    (out / "config.json").write_text(json.dumps(asdict(config), indent=1), encoding="utf-8")
    run_until(trainer, out, arguments.steps, deadline_s, 60.0 * arguments.validate_every_minutes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
