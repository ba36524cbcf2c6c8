"""Stage 2: a Moonshine with fewer tokens and layers learns to write as the large one, and known words.

    python -m training.moonshine.train --base BASE --cache CACHE --labels LABELS --run RUN --max-minutes 40

BASE is a Moonshine as `transformers` stores it (a folder, or its name on the hub), of the size that is to be
served. In float32; rounded afterwards by :mod:`training.moonshine.rounding`. Without ``--init-from`` a run
goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.compression.corpus import IGNORED, Batch
from training.compression.network import evaluating
from training.compression.train import (
    RoundedLearner,
    TrainConfig,
    add_run_options,
    check_layers,
    config_like,
    errors_of,
    loss_of,
    read_state,
    run_as_told,
    to_learn_on,
    told_by,
    until_when,
)
from training.distillation.kernels import working_dtype
from training.distillation.label import length_batches
from training.distillation.runner import begun_once
from training.errors import ConfigError, in_one_line
from training.moonshine.checkpoint import Published
from training.moonshine.corpus import MoonshineCorpus, SampleMaker, padded
from training.moonshine.model import Moonshine, Shape
from training.moonshine.search import greedy
from training.moonshine.vocabulary import Tokens

VALIDATION_FRAMES = 10_000


@dataclass(frozen=True)
class MoonshineConfig(TrainConfig):
    """What a run needs to know; stored with its checkpoints."""

    layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    rounded: bool = False
    learning_rate: float = 5e-5
    warmup_steps: int = 60
    ema_steps: int = 200


def small_network(
    large: Moonshine, layers: Sequence[int], cut: Tokens, own: Tokens | None = None
) -> Moonshine:
    """A copy with these layers of the decoder and these tokens only; `own`: of one that was cut before.

    Raises ConfigError where that lacks some of them.
    """
    rows = list(cut.ids)
    if own is not None:
        places = {published: row for row, published in enumerate(own.ids)}
        if lacking := sum(published not in places for published in rows):
            raise ConfigError(
                f"{lacking} of {len(rows)} kept tokens are none of what the network writes with"
            )
        rows = [places[published] for published in rows]
    inner = tuple(large.shape.decoder_inner[layer] for layer in layers)
    shape = replace(large.shape, vocabulary=len(cut.ids), decoder_inner=inner)
    small = Moonshine(shape, cut.prompt())
    small.encoder.load_state_dict(large.encoder.state_dict())
    for ours, index in zip(small.decoder.layers, layers, strict=True):
        ours.load_state_dict(large.decoder.layers[index].state_dict())
    small.decoder.layer_norm.load_state_dict(large.decoder.layer_norm.state_dict())
    small.decoder.embed_scale = large.decoder.embed_scale
    with torch.no_grad():
        small.decoder.embed_tokens.weight.copy_(large.decoder.embed_tokens.weight[rows])
    return small


def network_of(state: dict[str, Any], cut: Tokens) -> Moonshine:
    """The averaged network of a run's ``last.pt``, in float32."""
    network = Moonshine(Shape(**state["shape"]), cut.prompt())
    network.decoder.embed_scale = state["average"].get("decoder.embed_scale")
    network.load_state_dict(state["average"])
    return network.eval()


def tokens_beside(path: Path, usual: Tokens) -> Tokens:
    """What a state at `path` writes with; `usual` where nobody put that beside it."""
    beside = path.parent / MoonshineCorpus.cut_name
    return Tokens.load(beside) if beside.is_file() else usual


def learned(state: dict[str, Any], path: Path, cut: Tokens) -> Moonshine:
    """The averaged network of a run's state at `path`, with these of the tokens that lie beside it.

    Raises ConfigError where it lacks some of them.
    """
    own = tokens_beside(path, cut)
    network = network_of(state, own)
    if own.ids == cut.ids:
        return network
    return small_network(network, range(len(network.decoder.layers)), cut, own).eval()


def answers(network: Moonshine, batch: Batch) -> Tensor:
    """Logits (tokens, vocabulary) float32 of what follows each token of the texts and the prompt."""
    with torch.autocast("cpu", torch.bfloat16, enabled=working_dtype() is torch.bfloat16):
        audio, _, bias = network.encoder(batch.features, batch.lengths)
        states = network.decoder.states(batch.tokens, audio, bias)
        found = functional.linear(states[batch.wanted != IGNORED], network.decoder.embed_tokens.weight)
    return found.float()


class MoonshineTrainer(RoundedLearner):
    """The network, its rounded copy where it learns through the rounding, and its running average."""

    corpus: MoonshineCorpus
    network: Moonshine  # type: ignore[assignment]  # of the other family
    average: Moonshine  # type: ignore[assignment]

    def __init__(self, config: TrainConfig, network: Moonshine, corpus: MoonshineCorpus) -> None:
        super().__init__(config, network, corpus)
        self.maker = SampleMaker(corpus, config.batch_s, config.seed, network.most_tokens, masked=False)

    def shape(self) -> dict[str, Any]:
        """What `network_of` makes a network of."""
        return asdict(self.network.shape)

    def _loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, float]]:
        return loss_of(answers(self.rounded, batch), batch, self.config)

    def validation(self) -> dict[str, float]:
        """Word error rate of the average, as it is served, per source, on the held-out speakers."""
        return validated(self.served(), self.corpus, self.pool)


def transcribe(
    network: Moonshine, corpus: MoonshineCorpus, indices: Sequence[int], pool: ThreadPoolExecutor
) -> list[str]:
    """Greedy texts of cached utterances."""
    texts: dict[int, str] = {}

    def several(batch: list[int]) -> None:
        with torch.inference_mode():
            found = greedy(network, *padded([corpus.features(index) for index in batch]))
        for index, tokens in zip(batch, found, strict=True):
            texts[index] = corpus.tokenizer.decode(tokens)

    batches = length_batches([corpus.frames(index) for index in indices], VALIDATION_FRAMES)
    list(pool.map(several, [[indices[place] for place in batch] for batch in batches]))
    return [texts[index] for index in indices]


def validated(network: Moonshine, corpus: MoonshineCorpus, pool: ThreadPoolExecutor) -> dict[str, float]:
    """Word error rates of greedy texts on the held-out speakers, per source and in all."""
    with evaluating(network):
        return errors_of(transcribe(network, corpus, corpus.validation, pool), corpus)


def new_network(base: str, config: TrainConfig, cut: Tokens) -> Moonshine:
    """Cut out of a published one. Raises ConfigError, CheckpointError."""
    large = Published(base).network
    check_layers(config.layers, base, len(large.decoder.layers))
    return small_network(large, config.layers, cut)


@in_one_line("train")
def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="a published network of the size to be served")
    parser.add_argument("--init-from", type=Path, help="or another run's last.pt or best.pt, its average")
    parser.add_argument(
        "--rounded", action="store_true", help="learn through the rounding, best from --init-from rounded.pt"
    )
    add_run_options(parser, MoonshineConfig)
    arguments = parser.parse_args(given)
    deadline_s = until_when(arguments)
    torch.set_num_threads(1)
    last = arguments.run / "last.pt"
    begun_once(last, arguments.init_from)
    corpus = MoonshineCorpus(arguments.cache, arguments.labels)
    source = last if last.exists() else arguments.init_from
    state = read_state(source) if source else None
    stored = state.get("config", {}) if state else {}
    if source is arguments.init_from:
        stored = {name: value for name, value in stored.items() if name == "layers"}
    told = told_by(arguments) | ({"rounded": True} if arguments.rounded else {})
    config = config_like(MoonshineConfig, told, stored, source or last)
    if state and source == last:
        if tokens_beside(last, corpus.cut).ids != corpus.cut.ids:
            raise ConfigError(f"--labels {arguments.labels}: other tokens than {last} learned with")
        network = network_of(state, corpus.cut)
    elif state:
        network = learned(to_learn_on(state, config), arguments.init_from, corpus.cut)
    elif arguments.base:
        network = new_network(arguments.base, config, corpus.cut)
    else:
        raise ConfigError("a new run begins with --base or --init-from")
    trainer = MoonshineTrainer(config, network, corpus)
    if state and source == last:
        trainer.restore(state)
        print(f"going on at step {trainer.step}")
    run_as_told(trainer, arguments, deadline_s)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
