"""Stage 1a, where the file has to be smaller: feed-forwards with fewer neurons, the others made up for them.

    python -m training.moonshine.prune --base TINY --cache CACHE --labels LABELS --keep 0.75 --out PRUNED.pt

What a neuron gives is for a large part what others give as well. One after the other goes the one whose part
the remaining ones take over best, by least squares over what training batches make of them: the optimal
brain surgeon (Hassibi and Stork 1992) for a column of the second matrix at a time. How many each layer
gives up is chosen so that answers change least for the weights that are saved. Writes what
``train --init-from`` goes on with; learning brings most of the rest back.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.arguments import positive, share
from training.compression.corpus import Batch
from training.compression.network import evaluating
from training.compression.rounding import JUDGED_BATCHES, SEED, add_mean, divergence, not_rounded, noting
from training.errors import ConfigError, in_one_line
from training.four_bits import SMALL_GROUP
from training.moonshine.corpus import MoonshineCorpus, SampleMaker
from training.moonshine.model import DecoderLayer, EncoderLayer, Moonshine
from training.moonshine.rounding import mean_as_told
from training.moonshine.train import MoonshineConfig, answers, learned, new_network
from training.rounding import DAMPING
from training.torch_state import save_state

STEP = SMALL_GROUP
"""Neurons that go at a time: the second matrix keeps whole groups of inputs."""
PROBED_SHARE = 0.3
"""Of its neurons, which a layer alone does without to show what it is worth."""
Layer = EncoderLayer | DecoderLayer


def without(weight: Tensor, products: Tensor, kept: int) -> tuple[Tensor, Tensor, list[float]]:
    """A matrix with fewer inputs, whose outputs differ least from the given one's.

    Args:
        weight: (outputs, inputs) float32.
        products: (inputs, inputs), the sum of x xT over the inputs x that it is to meet.
        kept: how many inputs stay.

    Returns their indices (kept,) in rising order, the matrix (outputs, kept), and the sum of squared
    errors after each input that went, by the estimate with which it was chosen.
    """
    square = products.double().clone()
    count = len(square)
    square.diagonal().add_(DAMPING * square.diagonal().mean())
    inverse = torch.linalg.inv(square)
    found = weight.detach().double().clone()
    alive = torch.ones(count, dtype=torch.bool)
    errors: list[float] = []
    for _ in range(count - kept):
        losses = found.square().sum(dim=0) / inverse.diagonal()
        losses[~alive] = torch.inf
        gone = int(losses.argmin())
        errors.append(float(losses[gone]) + (errors[-1] if errors else 0.0))
        row = inverse[gone : gone + 1] / inverse[gone, gone]
        found -= found[:, gone : gone + 1] @ row
        inverse -= inverse[:, gone : gone + 1] @ row
        alive[gone] = False
        inverse[gone, gone] = 1.0
    stays = alive.nonzero()[:, 0]
    return stays, found[:, stays].float(), errors


def layers_of(network: Moonshine) -> dict[str, Layer]:
    """All that have a feed-forward, in the order in which they are heard through."""
    sides = (("encoder", network.encoder.layers), ("decoder", network.decoder.layers))
    return {
        f"{side}.layers.{index}": cast(Layer, layer)
        for side, layers in sides
        for index, layer in enumerate(layers)
    }


def heard_by(network: Moonshine, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Sums of x xT over the neurons x of layers with these names."""
    layers = layers_of(network)
    found: dict[str, Tensor] = {}
    places: list[tuple[str, nn.Module]] = [(name, layers[name].fc2) for name in names]
    with evaluating(network), noting(places, network, found):
        for batch in batches:
            audio, bias = network.audio_of(batch.features, batch.lengths)
            if any(name.startswith("decoder.") for name in names):
                network.decoder(batch.tokens, audio, bias)
    return found


def thin(layer: Layer, products: Tensor, kept: int) -> None:
    """Leave a layer's feed-forward so many neurons, made up for the others."""
    stays, weight, _ = without(layer.fc2.weight, products, kept)
    rows = torch.cat([stays, stays + layer.fc2.in_features]) if isinstance(layer, DecoderLayer) else stays
    first, second = layer.fc1, layer.fc2
    layer.fc1 = nn.Linear(first.in_features, len(rows))
    layer.fc2 = nn.Linear(kept, second.out_features)
    with torch.no_grad():
        layer.fc1.weight.copy_(first.weight[rows])
        layer.fc1.bias.copy_(first.bias[rows])
        layer.fc2.weight.copy_(weight)
        layer.fc2.bias.copy_(second.bias)


@dataclass(frozen=True)
class Worth:
    """What a layer's neurons are worth."""

    neurons: int
    cost: int
    """Weights of one."""
    errors: tuple[float, ...]
    """Of its feed-forward, after each neuron that goes."""
    divergence_per_error: float
    """Of the answers, in nats per token."""

    def lost(self, kept: int) -> float:
        """About how far answers are from those before, in nats per token."""
        gone = self.neurons - kept
        return self.errors[gone - 1] * self.divergence_per_error if gone else 0.0


def worths(network: Moonshine, batches: Sequence[Batch], unheard: Sequence[Batch]) -> dict[str, Worth]:
    """Of every layer: it alone does without some neurons, and `unheard` batches show what that changes."""
    products = heard_by(network, list(layers_of(network)), batches)
    found = {}
    for name, layer in tqdm(layers_of(network).items(), unit="layer", desc="asking"):
        neurons = layer.fc2.in_features
        *_, errors = without(layer.fc2.weight, products[name], STEP)
        probed = max(STEP, round(neurons * (1 - PROBED_SHARE)))
        thinned = copy.deepcopy(network)
        thin(layers_of(thinned)[name], products[name], probed)
        apart = divergence(network, thinned, unheard, answers)
        error = errors[neurons - probed - 1] if neurons > probed else 0.0
        cost = layer.fc1.weight[0].numel() * layer.fc1.out_features // neurons + layer.fc2.out_features
        found[name] = Worth(neurons, cost, tuple(errors), max(apart, 0.0) / error if error > 0 else 0.0)
    return found


def shares(worth: Sequence[Worth], keep: float) -> list[int]:
    """Neurons that each layer keeps, of all feed-forwards' weights at most the share `keep`.

    Steps go one by one where the answers lose least per weight. Raises ConfigError where each layer would
    keep less than a step of neurons.
    """
    kept = [one.neurons for one in worth]
    weights = sum(one.neurons * one.cost for one in worth)
    room = keep * weights
    while weights > room:
        able = [place for place, one in enumerate(worth) if kept[place] >= 2 * STEP]
        if not able:
            raise ConfigError(f"--keep {keep:g}: that is less than {STEP} neurons per layer")

        def price(place: int) -> float:
            one, now = worth[place], kept[place]
            return (one.lost(now - STEP) - one.lost(now)) / one.cost

        cheapest = min(able, key=price)
        kept[cheapest] -= STEP
        weights -= STEP * worth[cheapest].cost
    return kept


def prune(network: Moonshine, keep: float, batches: Sequence[Batch], unheard: Sequence[Batch]) -> Moonshine:
    """A copy whose feed-forwards have this share of their weights; each hears through the thinner ones."""
    kept = shares(list(worths(network, batches, unheard).values()), keep)
    thinned = copy.deepcopy(network)
    for (name, layer), count in tqdm(list(zip(layers_of(thinned).items(), kept, strict=True)), unit="layer"):
        if count < layer.fc2.in_features:
            thin(layer, heard_by(thinned, [name], batches)[name], count)
    sides = len(network.encoder.layers)
    thinned.shape = replace(
        network.shape, encoder_inner=tuple(kept[:sides]), decoder_inner=tuple(kept[sides:])
    )
    return thinned.eval()


@in_one_line("prune")
def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--base", help="a published network of the size to be served")
    start.add_argument("--init-from", type=Path, help="or a run's last.pt, which may have more tokens")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True, help="kept tokens and texts")
    parser.add_argument("--layers", type=int, nargs="+", help="of the published decoder; default: all six")
    parser.add_argument("--keep", type=share, default=0.75, help="of the feed-forwards' weights")
    parser.add_argument("--batches", type=positive, default=24, help="to hear, of 40 s each")
    add_mean(parser)
    parser.add_argument("--out", type=Path, required=True, help="what `train --init-from` is given")
    arguments = parser.parse_args(given)
    corpus = MoonshineCorpus(arguments.cache, arguments.labels)
    network, layers = _begun(arguments, corpus)
    mean_as_told(network, arguments, corpus, layers)
    maker = SampleMaker(corpus, MoonshineConfig.batch_s, SEED, network.most_tokens, masked=False)
    batches = [maker(step) for step in range(arguments.batches)]
    unheard = [maker(arguments.batches + step) for step in range(JUDGED_BATCHES)]
    thinned = prune(network, arguments.keep, batches, unheard)
    apart = divergence(network, thinned, unheard, answers)
    print(f"neurons: encoder {thinned.shape.encoder_inner}, decoder {thinned.shape.decoder_inner}")
    print(f"{apart:.4f} nats per token from what it answered before")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    config = {"layers": tuple(layers)}
    kept = {"shape": asdict(thinned.shape), "average": thinned.state_dict(), "config": config}
    save_state(kept, arguments.out)
    return 0


def _begun(arguments: argparse.Namespace, corpus: MoonshineCorpus) -> tuple[Moonshine, Sequence[int]]:
    """What neurons are taken from, and which layers of the published decoder it has."""
    if arguments.init_from is None:
        config = MoonshineConfig(layers=tuple(arguments.layers or MoonshineConfig.layers))
        return new_network(arguments.base, config, corpus.cut), config.layers
    if arguments.layers is not None:
        raise ConfigError("--layers: those of --init-from are there already; leave the option out")
    state: dict[str, Any] = not_rounded(arguments.init_from)
    return learned(state, arguments.init_from, corpus.cut).eval(), state["config"]["layers"]


if __name__ == "__main__":
    raise SystemExit(main())
