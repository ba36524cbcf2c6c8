"""Stage 3: the small network learns what to write, with the weights that will be served.

    python -m training.compression.train --base BASE --cache CACHE --labels LABELS --run RUN --max-minutes 80

The optimiser moves float32 weights; every step hears through their rounding to four bits, and its gradients
are taken as theirs (the straight-through estimator, Bengio et al. 2013). Half of the loss follows the labels,
half the large network's probabilities where it understood the utterance (Hinton et al. 2015). Without
``--init-from`` a run goes on where it stopped, with what it was told when it began but for what is said now;
its layers and its rounding stay.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from training.arguments import positive, positive_s
from training.compression.corpus import IGNORED, Batch, BatchMaker, LabelledCorpus, Sound, padded
from training.compression.label import TOKENS_PER_S, Large
from training.compression.network import (
    coarse_weights,
    decode,
    evaluating,
    greedy,
    heard,
    listen,
    logits,
    round_into,
    small_network,
)
from training.compression.vocabulary import CutVocabulary
from training.distillation.dataset import normalise_text
from training.distillation.evaluate import word_error_rates
from training.distillation.label import length_batches
from training.distillation.learner import Learner, LearnerConfig, adamw
from training.distillation.runner import begun_once, deadline, run_until
from training.errors import CheckpointError, ConfigError, in_one_line
from training.recipes.whisper_ctc.model import EncoderConfig
from training.recipes.whisper_seq2seq.model import DecoderConfig, WhisperSeq2Seq

VALIDATION_FRAMES = 10_000


@dataclass(frozen=True)
class TrainConfig(LearnerConfig):
    """What a run needs to know; stored with its checkpoints."""

    layers: tuple[int, ...] = (0, 1, 3)
    """Of the large decoder, those that are kept."""
    rounded: bool = True
    """Whether the network hears through the rounding while it learns."""
    learning_rate: float = 5e-5
    warmup_steps: int = 200
    decay_share: float = 1.0
    ema_steps: int = 400
    gradient_clip: float = 1.0
    teacher_share: float = 0.5
    """Of the loss, where the large network understood the utterance."""
    smoothing: float = 0.05
    """Of the labels elsewhere (Szegedy et al. 2016)."""
    dropout: float = 0.1
    """In the decoder."""


Config = TypeVar("Config", bound=TrainConfig)
AnySound = TypeVar("AnySound", bound=Sound)


def network_of(state: dict[str, Any], cut: CutVocabulary) -> WhisperSeq2Seq:
    """The averaged network of a run's ``last.pt``, in float32."""
    shape = state["shape"]
    network = WhisperSeq2Seq(
        EncoderConfig(**shape["encoder"]), DecoderConfig(**shape["decoder"]), cut.prompt()
    )
    network.decoder.embed_scale = state["average"].get("decoder.embed_scale")
    network.load_state_dict(state["average"])
    return network.eval()


class CorpusLearner(Learner[AnySound]):
    """What learns from a labelled corpus; `network_of` reads what it leaves."""

    config: TrainConfig
    corpus: LabelledCorpus
    network: WhisperSeq2Seq
    average: WhisperSeq2Seq

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, and another to go on from the average."""
        return super().state() | {
            "shape": self.shape(),
            "network": self.learned.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimisers[0].state_dict(),
        }

    def shape(self) -> dict[str, Any]:
        """Sizes of the network, for who reads the state."""
        network = self.network
        return {"encoder": asdict(network.encoder.config), "decoder": asdict(network.decoder.config)}

    def restore(self, state: dict[str, Any]) -> None:
        """The reverse of :meth:`state`."""
        super().restore(state)
        self.learned.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimisers[0].load_state_dict(state["optimiser"])


class RoundedLearner(CorpusLearner[Batch]):
    """A network whose rounded copy hears and writes, if it is told to learn through the rounding."""

    def __init__(self, config: TrainConfig, network: Any, corpus: LabelledCorpus) -> None:
        super().__init__(config)
        self.corpus, self.network = corpus, network.train()
        for layer in network.decoder.layers:
            layer.dropout.p = config.dropout
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.learned, self.averaged = self.network, self.average
        self.coarse = coarse_weights(network) if config.rounded else set()
        self.rounded = copy.deepcopy(network) if config.rounded else network
        self.optimisers = [adamw(config, (p for p in network.parameters() if p.requires_grad))]

    def _gradients(self, batches: list[Batch], progress: float) -> list[dict[str, float]]:
        """Those of the rounded weights are taken for those of the exact ones."""
        if not self.coarse:
            return super()._gradients(batches, progress)
        round_into(self.rounded, self.network, self.coarse)
        parts = super()._gradients(batches, progress)
        for exact, rounded in zip(self.network.parameters(), self.rounded.parameters(), strict=True):
            exact.grad, rounded.grad = rounded.grad, None
        return parts

    def served(self) -> Any:
        """A copy of the average as it is served."""
        served = copy.deepcopy(self.average)
        round_into(served, self.average, self.coarse)
        return served


class Trainer(RoundedLearner):
    """Weights in float32, their rounded copy that hears and writes, and their running average."""

    def __init__(self, config: TrainConfig, network: WhisperSeq2Seq, corpus: LabelledCorpus) -> None:
        super().__init__(config, network, corpus)
        self.maker = BatchMaker(corpus, config.batch_s, config.seed, network.most_tokens)

    def _loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, float]]:
        return loss_of(answers(self.rounded, batch), batch, self.config)

    def validation(self) -> dict[str, float]:
        """Word error rate of the averaged, rounded weights per source, on the held-out speakers."""
        return validated(self.served(), self.corpus, self.pool)


def loss_of(logits: Tensor, batch: Batch, config: TrainConfig) -> tuple[Tensor, dict[str, float]]:
    """Of what follows each token of the texts (tokens, vocabulary), and its parts."""
    found = logits.log_softmax(dim=-1)
    counts = batch.wanted != IGNORED
    wanted = batch.wanted[counts]
    label = -found.gather(1, wanted[:, None])[:, 0]
    probabilities = batch.probabilities[counts]
    teacher = -(probabilities * found.gather(1, batch.likely[counts])).sum(dim=-1)
    taught = probabilities.sum(dim=-1) > 0
    share, smooth = config.teacher_share, config.smoothing
    alone = (1 - smooth) * label - smooth * found.mean(dim=-1)
    loss = torch.where(taught, (1 - share) * label + share * teacher, alone).mean()
    right = (found.argmax(dim=-1) == wanted).float().mean()
    return loss, {"label": float(label.detach().mean()), "right": float(right)}


def answers(network: WhisperSeq2Seq, batch: Batch) -> Tensor:
    """Logits (tokens, vocabulary) float32 of what follows each token of the texts and the prompt."""
    audio, _, missing = listen(network, batch.features, batch.lengths)
    states = decode(network, batch.tokens, heard(network, audio), missing)
    states = states[:, len(network.prompt.ids) - 1 :]
    return logits(network, states[batch.wanted != IGNORED])


def transcribe(
    network: WhisperSeq2Seq, corpus: LabelledCorpus, indices: Sequence[int], pool: ThreadPoolExecutor
) -> list[str]:
    """Greedy texts of cached utterances."""
    texts: dict[int, str] = {}

    def several(batch: list[int]) -> None:
        with torch.inference_mode():
            features, lengths = padded([corpus.features(index) for index in batch])
            audio, counts, missing = listen(network, features, lengths)
            limits = [int(count * 0.02 * TOKENS_PER_S) + 2 for count in counts.tolist()]
            for index, tokens in zip(
                batch, greedy(network, audio, missing, network.prompt, limits), strict=True
            ):
                texts[index] = corpus.tokenizer.decode(tokens)

    batches = length_batches([corpus.frames(index) for index in indices], VALIDATION_FRAMES)
    list(pool.map(several, [[indices[place] for place in batch] for batch in batches]))
    return [texts[index] for index in indices]


def validated(network: WhisperSeq2Seq, corpus: LabelledCorpus, pool: ThreadPoolExecutor) -> dict[str, float]:
    """Word error rates of greedy texts on the held-out speakers, per source and in all."""
    with evaluating(network):
        return errors_of(transcribe(network, corpus, corpus.validation, pool), corpus)


def errors_of(texts: Sequence[str], corpus: LabelledCorpus) -> dict[str, float]:
    """Word error rates, per source and in all, of what was written for the held-out speakers."""
    rows = [corpus.rows[index] for index in corpus.validation]
    heard_texts = [normalise_text(text.replace("-", " ")) for text in texts]
    return word_error_rates([row.text for row in rows], heard_texts, [row.source for row in rows])


def new_network(base: str, language: str, config: TrainConfig, cut: CutVocabulary) -> WhisperSeq2Seq:
    """Cut out of the large one. Raises ConfigError, CheckpointError."""
    large = Large(base, language)
    check_layers(config.layers, base, large.network.decoder.config.layers)
    if large.network.encoder.config.bands != 80:
        raise ConfigError(f"{base} hears {large.network.encoder.config.bands} bands, expected 80")
    return small_network(large.network, config.layers, cut)


def check_layers(layers: Sequence[int], base: str, have: int) -> None:
    """Raises ConfigError for what a decoder of so many layers does not have."""
    if wrong := [index for index in layers if not 0 <= index < have]:
        raise ConfigError(f"--layers {wrong[0]}: the decoder of {base} has layers 0 to {have - 1}")


def read_state(path: Path) -> dict[str, Any]:
    """What a run left. Raises CheckpointError where there is nothing."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def to_learn_on(state: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """A state whose average is what to begin with.

    Of one that was rounded, who learns through the rounding takes the weights nearest to those before it.
    """
    before = state.get("before", {}) if config.rounded else {}
    return state | {"average": state["average"] | before}


def add_run_options(parser: argparse.ArgumentParser, config: type[TrainConfig]) -> None:
    """What a run hears, where it stands, and how long and how fast it learns: `config` has the defaults."""
    parser.add_argument("--language", default="en", metavar="xx")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True, help="kept tokens and texts")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, created or resumed")
    parser.add_argument("--layers", type=int, nargs="+", help=f"default: {_spoken(config.layers)}")
    parser.add_argument("--steps", type=positive)
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--batch-s", type=positive_s, help=f"default: {config.batch_s:g}")
    parser.add_argument("--learning-rate", type=float, help=f"default: {config.learning_rate:g}")
    parser.add_argument("--workers", type=positive, help=f"default: {config.workers}")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--validate-every-minutes", type=float, default=8.0)


def until_when(arguments: argparse.Namespace) -> float | None:
    """The ``time.time()`` value at which a run ends, if it does not end by its steps."""
    deadline_s = deadline(None, arguments.max_minutes)
    if arguments.steps is None and deadline_s is None:
        raise SystemExit("say how long: --steps or --max-minutes")
    return deadline_s


def told_by(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of a configuration that the options of `add_run_options` say; raises ConfigError."""
    layers = arguments.layers
    if layers is not None and len(set(layers)) < len(layers):
        raise ConfigError(f"--layers {_spoken(layers)}: a layer is there twice, expected each once at most")
    told = {
        "layers": None if layers is None else tuple(layers),
        "workers": arguments.workers,
        "batch_s": arguments.batch_s,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
    }
    return {name: value for name, value in told.items() if value is not None}


def config_like(
    config: type[Config], told: Mapping[str, Any], stored: Mapping[str, Any], path: Path
) -> Config:
    """What was `told`, and for the rest what the state at `path` was made with.

    Raises ConfigError where its layers or its rounding were told otherwise: they are those of its weights.
    """
    known = {field.name: stored[field.name] for field in fields(config) if field.name in stored}
    if "layers" in known:
        known["layers"] = tuple(known["layers"])
        if (asked := told.get("layers", known["layers"])) != known["layers"]:
            raise ConfigError(
                f"--layers {_spoken(asked)}: {path} has layers {_spoken(known['layers'])}; "
                "leave the option out"
            )
    if known.get("rounded") and not told.get("rounded", True):
        raise ConfigError(f"--exact: {path} learns through the rounding; give another --run")
    return config(**{**known, **told})


def _spoken(layers: Sequence[int]) -> str:
    return " ".join(map(str, layers))


def run_as_told(trainer: CorpusLearner[Any], arguments: argparse.Namespace, deadline_s: float | None) -> None:
    """Run, with vocabulary and configuration beside the checkpoints."""
    arguments.run.mkdir(parents=True, exist_ok=True)
    trainer.corpus.cut.save(arguments.run / trainer.corpus.cut_name)
    described_config = json.dumps(asdict(trainer.config), indent=1)
    (arguments.run / "config.json").write_text(described_config, encoding="utf-8")
    run_until(trainer, arguments.run, arguments.steps, deadline_s, 60.0 * arguments.validate_every_minutes)


@in_one_line("train")
def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="what training.compression.label was given")
    parser.add_argument("--init-from", type=Path, help="or another run's last.pt or best.pt, its average")
    parser.add_argument("--exact", action="store_true", help="in float32; rounded afterwards, by .rounding")
    add_run_options(parser, TrainConfig)
    arguments = parser.parse_args(given)
    deadline_s = until_when(arguments)
    torch.set_num_threads(1)
    told = told_by(arguments) | ({"rounded": False} if arguments.exact else {})
    last = arguments.run / "last.pt"
    begun_once(last, arguments.init_from)
    corpus = LabelledCorpus(arguments.cache, arguments.labels)
    if last.exists():
        state = read_state(last)
        config = config_like(TrainConfig, told, state["config"], last)
        trainer = Trainer(config, network_of(state, corpus.cut), corpus)
        trainer.restore(state)
        print(f"going on at step {trainer.step}")
    elif arguments.init_from:
        state = read_state(arguments.init_from)
        begun = {name: value for name, value in state.get("config", {}).items() if name == "layers"}
        config = config_like(TrainConfig, told, begun, arguments.init_from)
        trainer = Trainer(config, network_of(to_learn_on(state, config), corpus.cut), corpus)
    elif arguments.base:
        config = TrainConfig(**told)
        trainer = Trainer(config, new_network(arguments.base, arguments.language, config, corpus.cut), corpus)
    else:
        raise CheckpointError(f"{last}: no run to go on with; --base or --init-from says what to begin with")
    run_as_told(trainer, arguments, deadline_s)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
