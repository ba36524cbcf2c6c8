"""Stage 3b, after `train --exact`: weights of four bits that change least of what the network answers.

    python -m training.compression.rounding --run RUN --cache CACHE --labels LABELS [--mean-with OTHER SHARE]

With ``--mean-with`` a part of the weights is that of others which began in the same place: of the published
ones (what a few hours taught mostly stays, and much of what they made it forget comes back, Wortsman et al.
2022), better of what `unpad` left, which knows what those know and hears clips alone, or of another run.

Columns of matrices are made alike first, where that changes no answer (:mod:`training.equalise`). Then one
layer after the other hears training batches through the layers that are rounded already, and its
matrices are rounded for what they are given (:func:`training.rounding.compensated`). Writes ``rounded.pt``
beside ``last.pt``; `publish` takes it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from training.arguments import positive
from training.compression.corpus import Batch, BatchMaker, LabelledCorpus
from training.compression.network import coarse_weights, evaluating
from training.compression.train import TrainConfig, answers, network_of, new_network, read_state
from training.equalise import equalise
from training.errors import ConfigError, in_one_line
from training.four_bits import as_matrix, from_matrix, within_steps
from training.inference import Waveform
from training.moonshine.model import Moonshine
from training.recipes.whisper_seq2seq.model import WhisperSeq2Seq
from training.rounding import compensated
from training.torch_state import save_state

SEED = 7_919
"""Batches that no training run has drawn."""
NAME = "rounded.pt"
JUDGED_BATCHES = 12
Place = tuple[str, nn.Module]
Heard = tuple[Tensor, Tensor, Tensor]
"""Features (samples for a Moonshine) and their lengths, and tokens: prompt and text."""
Network = WhisperSeq2Seq | Moonshine
AnyNetwork = TypeVar("AnyNetwork", bound=Network)


def _inputs(module: nn.Module, values: Tensor) -> Tensor:
    """What a module's matrix is multiplied by: (rows, inputs)."""
    if isinstance(module, nn.Conv1d):
        padding, stride, taps = int(module.padding[0]), module.stride[0], module.kernel_size[0]
        padded = functional.pad(values, (padding, padding))
        windows = padded.unfold(2, taps, stride)  # (batch, channels, frames, taps)
        return windows.permute(0, 2, 3, 1).flatten(2).flatten(0, 1)
    return values.flatten(0, -2)


@contextmanager
def noting(places: Sequence[Place], network: Network, found: dict[str, Tensor]) -> Iterator[None]:
    """Sums of x xT of every place while the network runs, added up in `found`."""

    def note(name: str, module: nn.Module, values: Tensor) -> None:
        rows = _inputs(module, values).float()
        found[name] = found.get(name, 0.0) + rows.T @ rows

    def before(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, given: note(name, module, given[0])

    def after(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, _, said: note(name, module, said)

    with ExitStack() as stack:
        for name, module in places:
            if isinstance(module, nn.Embedding):  # the output layer, which multiplies what this one says
                hook = network.decoder.layer_norm.register_forward_hook(after(name))
            else:
                hook = module.register_forward_pre_hook(before(name))
            stack.callback(hook.remove)
        yield


def stages(network: Network) -> Iterator[list[Place]]:
    """Places of coarse weights, those of one layer together, in the order in which they are heard through."""
    coarse = coarse_weights(network)
    places = [(name, module) for name, module in network.named_modules() if f"{name}.weight" in coarse]

    def within(prefix: str) -> list[Place]:
        return [place for place in places if place[0].startswith(prefix)]

    yield within("encoder.conv")
    for side, layers in (("encoder", network.encoder.layers), ("decoder", network.decoder.layers)):
        for index in range(len(layers)):
            yield within(f"{side}.layers.{index}.")
    yield within("decoder.embed_tokens")


def heard_by(network: WhisperSeq2Seq, clip: Waveform) -> Heard:
    """A recording (samples,) with the network's own text."""
    waveform, lengths = torch.from_numpy(clip)[None], torch.tensor([len(clip)])
    with evaluating(network):
        features, counts = network.frontend(waveform, lengths)
        steps, found, _ = network.generate(waveform, lengths)
    text = steps[:, : int(found)].argmax(dim=-1)
    return features, counts, torch.cat([torch.tensor([network.prompt.ids]), text], dim=1)


def mean_with(network: nn.Module, others: Sequence[tuple[nn.Module, float]]) -> None:
    """Give a network the mean of its own weights and of others' of its shape, which have these shares.

    Raises ConfigError for shares that are no part of one.
    """
    own = 1.0 - sum(share for _, share in others)
    if own < -1e-9 or not all(share >= 0 for _, share in others):
        raise ConfigError(f"--mean-with: shares {[share for _, share in others]}, expected 1 in all at most")
    with torch.no_grad():
        for values in zip(network.parameters(), *(other.parameters() for other, _ in others), strict=True):
            values[0].mul_(own)
            for value, (_, share) in zip(values[1:], others, strict=True):
                values[0].add_(value, alpha=share)


def round_layers(
    network: Network, batches: Sequence[Heard], told: Callable[[str], object] = lambda _: None
) -> None:
    """Give all coarse weights of a network their rounded values; `told` hears of each layer that is done."""
    for places in stages(network):
        if not places:
            continue
        found: dict[str, Tensor] = {}
        with evaluating(network), noting(places, network, found):
            for features, lengths, tokens in batches:
                audio, bias = network.audio_of(features, lengths)
                if places[0][0].startswith("decoder."):
                    network.decoder(tokens, audio, bias)
        for name, module in places:
            weight = cast(Tensor, module.weight)
            with torch.no_grad():
                weight.copy_(from_matrix(compensated(as_matrix(weight), found[name]), weight.shape))
        told(places[-1][0])


def divergence(
    exact: AnyNetwork,
    network: AnyNetwork,
    batches: Sequence[Batch],
    answers: Callable[[AnyNetwork, Batch], Tensor],
) -> float:
    """Mean Kullback-Leibler divergence of what is likely after each token of the texts, in nats.

    What the gate of a bundle cannot see: its float32 graph has the rounded weights.
    """
    total, tokens = 0.0, 0
    with evaluating(exact), evaluating(network):
        for batch in batches:
            wanted, found = (answers(each, batch).log_softmax(dim=-1) for each in (exact, network))
            total += float((wanted.exp() * (wanted - found)).sum())
            tokens += len(wanted)
    return total / tokens


def not_rounded(path: Path) -> dict[str, Any]:
    """What a run left. Raises ConfigError for columns made alike: a mean with others is none of these."""
    state = read_state(path)
    if state["average"].get("decoder.embed_scale") is not None:
        raise ConfigError(f"--mean-with {path}: its weights are rounded; give last.pt or best.pt beside it")
    return state


def share_of(text: str) -> float:
    """Raises ConfigError."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--mean-with: share {text!r} is no number") from None


@in_one_line("rounding")
def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--language", default="en", metavar="xx")
    arguments = parser.parse_args(given)
    state = read_state(arguments.run / "last.pt")
    corpus = LabelledCorpus(arguments.cache, arguments.labels)
    network = network_of(state, corpus.cut)
    config = TrainConfig(layers=tuple(state["config"]["layers"]))

    def other(name: str) -> WhisperSeq2Seq:
        if name.endswith(".pt"):
            found = network_of(not_rounded(Path(name)), corpus.cut)
        else:
            found = new_network(name, arguments.language, config, corpus.cut)
        theirs, ours = ([value.shape for value in one.parameters()] for one in (found, network))
        if theirs != ours:
            have, wanted = (len(one.decoder.layers) for one in (found, network))
            raise ConfigError(
                f"--mean-with {name}: a network of another shape, with {have} layers in its decoder; that of "
                f"{arguments.run} has {wanted}"
            )
        return found

    mean_with(network, [(other(name), share_of(share)) for name, share in arguments.mean_with])
    maker = BatchMaker(corpus, TrainConfig.batch_s, SEED, network.most_tokens, masked=False)
    round_and_keep(network, state, maker, answers, arguments)
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a rounding is told."""
    parser.add_argument("--run", type=Path, required=True, help="what training left")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--batches", type=positive, default=40, help="to hear, of 40 s each")
    add_mean(parser)


def add_mean(parser: argparse.ArgumentParser) -> None:
    """Networks whose mean with another is taken."""
    parser.add_argument(
        "--mean-with",
        nargs=2,
        action="append",
        default=[],
        metavar=("OTHER", "SHARE"),
        help="last.pt of another run or what the run began with, and its share of the mean",
    )


def round_and_keep(
    network: AnyNetwork,
    state: Mapping[str, Any],
    maker: BatchMaker,
    answers: Callable[[AnyNetwork, Batch], Tensor],
    arguments: argparse.Namespace,
) -> None:
    """Round a network for what it hears of the first batches, say what that changed, and write it."""
    drawn = (maker(step) for step in range(arguments.batches))
    batches = [(batch.features, batch.lengths, batch.tokens) for batch in drawn]
    equalise(network)
    exact = copy.deepcopy(network)
    with tqdm(total=len(list(stages(network))), unit="layer", desc="rounding") as bar:
        round_layers(network, batches, lambda name: bar.update())
    unheard = [maker(arguments.batches + step) for step in range(JUDGED_BATCHES)]
    apart = divergence(exact, network, unheard, answers)
    print(f"{apart:.4f} nats per token from what it answered before")
    coarse = coarse_weights(network)
    before = {
        name: within_steps(weight, network.get_parameter(name))
        for name, weight in exact.named_parameters()
        if name in coarse
    }
    kept = {
        "shape": state["shape"],
        "average": network.state_dict(),
        "before": before,
        "config": {"layers": state["config"]["layers"]},
        "counters": state["counters"],
    }
    save_state(kept, arguments.run / NAME)


if __name__ == "__main__":
    raise SystemExit(main())
