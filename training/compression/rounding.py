"""Stage 3b, after `train --exact`: weights of four bits that change least of what the network answers.

    python -m training.compression.rounding --run RUN --cache CACHE --labels LABELS [--mean-with OTHER SHARE]

With ``--mean-with`` a part of the weights is that of others which began in the same place: of the published
ones (what a few hours taught mostly stays, and much of what they made it forget comes back, Wortsman et al.
2022), better of what `unpad` left, which knows what those know and hears clips alone, or of another run.

Columns of matrices are made alike first, where that changes no answer (:mod:`training.equalise`). Then one
matrix after the other hears training batches through all that are rounded already, and is rounded so that it
answers as it did before any was (:func:`training.rounding.compensated`). Writes ``rounded.pt`` beside
``last.pt``; `publish` takes it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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
from training.four_bits import as_matrix, from_matrix
from training.inference import Waveform
from training.masks import frame_mask
from training.recipes.whisper_seq2seq.model import DecoderLayer, WhisperSeq2Seq
from training.rounding import compensated
from training.torch_state import save_state

SEED = 7_919
"""Batches that no training run has drawn."""
NAME = "rounded.pt"
JUDGED_BATCHES = 12
OF_AUDIO = ("encoder_attn.k_proj", "encoder_attn.v_proj")
"""Of a layer of the decoder, what is given the audio's frames and not the tokens."""
Heard = tuple[Tensor, Tensor, Tensor]
"""Features and their lengths, and tokens: prompt and text."""


class _Sums:
    """Means of what a matrix is given, x (rows, inputs), and is to give, t (rows, outputs), and products.

    All float64, of differences from the first rows' means: what hardly varies would be lost beside its mean.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        self.rows = 0
        self.origins = inputs.mean(dim=0), outputs.mean(dim=0)
        self.sums = [torch.zeros(values.shape[1], dtype=torch.float64) for values in (inputs, outputs)]
        self.products, self.crossed = (
            torch.zeros(values.shape[1], inputs.shape[1], dtype=torch.float64) for values in (inputs, outputs)
        )
        self.add(inputs, outputs)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Some rows more."""
        given, wanted = inputs - self.origins[0], outputs - self.origins[1]
        self.rows += len(given)
        for total, values in zip(self.sums, (given, wanted), strict=True):
            total += values.sum(dim=0)
        self.products += given.T @ given
        self.crossed += wanted.T @ given

    def means(self) -> list[Tensor]:
        """Of x (inputs,), and of t (outputs,)."""
        return [origin + total / self.rows for origin, total in zip(self.origins, self.sums, strict=True)]

    def centred(self) -> tuple[Tensor, Tensor]:
        """Sums of x xT (inputs, inputs) and of t xT (outputs, inputs), less their means'."""
        given, wanted = self.sums
        return (
            self.products - torch.outer(given, given) / self.rows,
            self.crossed - torch.outer(wanted, given) / self.rows,
        )


def _add(found: dict[str, _Sums], name: str, inputs: Tensor, outputs: Tensor) -> None:
    """Rows more to what there is under a name, or the first ones."""
    if name in found:
        found[name].add(inputs, outputs)
    else:
        found[name] = _Sums(inputs, outputs)


def _round(module: nn.Linear | nn.Conv1d, sums: _Sums) -> None:
    """Give a module the weights of four bits, and the bias, that answer best to what it is given.

    First the exact ones that do, by ridge regression from those it has: the fewer rows, the nearer it stays.
    Without a bias it makes keys, and what is added to all keys changes nothing.
    """
    weight = as_matrix(module.weight).double()
    products, crossed = sums.centred()
    ridge = len(products) / sums.rows * products.diagonal().mean()
    steadied = products + ridge * torch.eye(len(products), dtype=torch.float64)
    missing = torch.linalg.solve(steadied, (crossed - weight @ products).T).T
    found = compensated(weight + missing, products)
    module.weight.copy_(from_matrix(found, module.weight.shape))
    if module.bias is not None:
        given, wanted = sums.means()
        module.bias.copy_(wanted - found.double() @ given)


@contextmanager
def _noting(network: nn.Module, names: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What modules were given last and what they gave, while the network runs."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, given, gave: found.update({name: (given[0], gave)})

    with ExitStack() as stack:
        for name in names:
            hook = network.get_submodule(name).register_forward_hook(note(name))
            stack.callback(hook.remove)
        yield found


def _windows(module: nn.Conv1d, values: Tensor) -> Tensor:
    """What a convolution's matrix is multiplied by: (batch, frames, inputs) of (batch, channels, frames)."""
    padding, stride, taps = int(module.padding[0]), module.stride[0], module.kernel_size[0]
    padded = functional.pad(values, (padding, padding))
    return padded.unfold(2, taps, stride).permute(0, 2, 3, 1).flatten(2)


@dataclass
class _Call:
    """A layer's arguments for one batch, in the exact network and in the one that is being rounded."""

    exact: tuple[Any, ...]
    rounded: tuple[Any, ...]
    own: Tensor
    """(batch, frames or tokens) bool: which of them count, and"""
    audio: Tensor
    """of the audio that is listened to."""


def _steps(layer: nn.Module) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """Matrices that are rounded together, in the order in which they are heard through.

    With the normalisation before them where their output is added to what that is given.
    """
    yield ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), None
    yield ("self_attn.out_proj",), "self_attn_layer_norm"
    if isinstance(layer, DecoderLayer):
        yield ("encoder_attn.q_proj", *OF_AUDIO), None
        yield ("encoder_attn.out_proj",), "encoder_attn_layer_norm"
    yield ("fc1",), None
    yield ("fc2",), "final_layer_norm"


def _round_layer(exact: nn.Module, layer: nn.Module, coarse: Collection[str], calls: Sequence[_Call]) -> None:
    """Round what of a layer is `coarse`, for what it is given; then let every call go on behind the layer.

    What is added to a stream is to lead it where it is in the exact network, wherever it is before.
    """
    for names, norm in _steps(layer):
        chosen = [name for name in names if f"{name}.weight" in coarse]
        if not chosen:
            continue
        found: dict[str, _Sums] = {}
        watched = [*chosen, *([norm] if norm else [])]
        with _noting(exact, watched) as wanted, _noting(layer, watched) as given:
            for call in calls:
                exact(*call.exact)
                layer(*call.rounded)
                for name in chosen:
                    aim = wanted[name][1]
                    if norm:
                        aim = aim + wanted[norm][0] - given[norm][0]
                    own = call.audio if name in OF_AUDIO else call.own
                    _add(found, name, given[name][0][own], aim[own])
        for name, sums in found.items():
            _round(cast(nn.Linear, layer.get_submodule(name)), sums)
    for call in calls:
        call.exact = (exact(*call.exact), *call.exact[1:])
        call.rounded = (layer(*call.rounded), *call.rounded[1:])


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
    network: WhisperSeq2Seq, batches: Sequence[Heard], told: Callable[[str], object] = lambda _: None
) -> None:
    """Give all coarse weights of a network their rounded values; `told` hears of each layer that is done.

    A copy that stays exact hears the same, and every matrix is to answer as there in spite of what it is
    given (Li et al. 2025 call that asymmetric calibration).
    """
    exact, coarse = copy.deepcopy(network), coarse_weights(network)

    def within(prefix: str) -> set[str]:
        return {name.removeprefix(prefix) for name in coarse if name.startswith(prefix)}

    with evaluating(exact), evaluating(network):
        if within("encoder.conv2."):
            _round_convolution(network, batches)
        told("encoder.conv2")
        calls = []
        for features, lengths, _ in batches:
            before, counts, bias = exact.encoder.convolved(features, lengths, fixed=network.fixed)
            values, _, _ = network.encoder.convolved(features, lengths, fixed=network.fixed)
            own = _all_own(values) if network.fixed else frame_mask(counts, values.shape[1])
            calls.append(_Call((before, bias), (values, bias), own, own))
        for index, layers in enumerate(zip(exact.encoder.layers, network.encoder.layers, strict=True)):
            _round_layer(*layers, within(f"encoder.layers.{index}."), calls)
            told(f"encoder.layers.{index}")
        for call, (_, _, tokens) in zip(calls, batches, strict=True):
            values, causal = exact.decoder.embedded(tokens)
            bias = call.exact[1]
            call.exact = values, causal, exact.encoder.layer_norm(call.exact[0]), bias
            call.rounded = values, causal, network.encoder.layer_norm(call.rounded[0]), bias
            call.own = tokens != network.prompt.end
        if within("decoder.embed_tokens."):
            _round_tokens(exact, network, calls)
            for call, (_, _, tokens) in zip(calls, batches, strict=True):
                call.rounded = network.decoder.embedded(tokens)[0], *call.rounded[1:]
        told("decoder.embed_tokens")
        for index, layers in enumerate(zip(exact.decoder.layers, network.decoder.layers, strict=True)):
            _round_layer(*layers, within(f"decoder.layers.{index}."), calls)
            told(f"decoder.layers.{index}")


def _all_own(values: Tensor) -> Tensor:
    """(batch, frames) true of (batch, frames, width)."""
    return torch.ones(values.shape[:2], dtype=torch.bool)


def _round_convolution(network: WhisperSeq2Seq, batches: Sequence[Heard]) -> None:
    """The second one, for what the first one gives."""
    convolution, sums = network.encoder.conv2, dict[str, _Sums]()
    with _noting(network.encoder, ["conv2"]) as found:
        for features, lengths, _ in batches:
            values, counts, _ = network.encoder.convolved(features, lengths, fixed=network.fixed)
            own = _all_own(values) if network.fixed else frame_mask(counts, values.shape[1])
            given, gave = found["conv2"]
            _add(sums, "conv2", _windows(convolution, given)[own], gave.transpose(1, 2)[own])
    _round(convolution, sums["conv2"])


def _round_tokens(exact: WhisperSeq2Seq, network: WhisperSeq2Seq, calls: Sequence[_Call]) -> None:
    """The rows of the tokens, for what they are multiplied by as the output.

    Before the layers, which make up for what the rows are as inputs.
    """
    products = torch.zeros(network.decoder.config.width, network.decoder.config.width)
    for call in calls:
        values, *others = call.exact
        for layer in exact.decoder.layers:
            values = layer(values, *others)
        states = exact.decoder.layer_norm(values)[call.own]
        products += states.T @ states
    weight = network.decoder.embed_tokens.weight
    weight.copy_(compensated(weight, products))


def divergence(exact: WhisperSeq2Seq, network: WhisperSeq2Seq, batches: Sequence[Batch]) -> float:
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
    parser.add_argument("--run", type=Path, required=True, help="of training.compression.train")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--batches", type=positive, default=40, help="to hear, of 40 s each")
    parser.add_argument(
        "--mean-with",
        nargs=2,
        action="append",
        default=[],
        metavar=("OTHER", "SHARE"),
        help="last.pt of another run or what the run began with, and its share of the mean",
    )
    parser.add_argument("--language", default="en", metavar="xx")
    arguments = parser.parse_args(given)
    state = read_state(arguments.run / "last.pt")
    corpus = LabelledCorpus(arguments.cache, arguments.labels)
    network = network_of(state, corpus.cut)
    config = TrainConfig(layers=tuple(state["config"]["layers"]))

    def other(name: str) -> WhisperSeq2Seq:
        if name.endswith(".pt"):
            return network_of(read_state(Path(name)), corpus.cut)
        return new_network(name, arguments.language, config, corpus.cut)

    mean_with(network, [(other(name), share_of(share)) for name, share in arguments.mean_with])
    most_tokens = network.decoder.config.positions - len(network.prompt.ids)
    maker = BatchMaker(corpus, TrainConfig.batch_s, SEED, most_tokens, masked=False)
    drawn = (maker(step) for step in range(arguments.batches))
    batches = [(batch.features, batch.lengths, batch.tokens) for batch in drawn]
    equalise(network)
    exact = copy.deepcopy(network)
    layers = 2 + len(network.encoder.layers) + len(network.decoder.layers)
    with tqdm(total=layers, unit="layer", desc="rounding") as bar:
        round_layers(network, batches, lambda name: bar.update())
    unheard = [maker(arguments.batches + step) for step in range(JUDGED_BATCHES)]
    print(f"{divergence(exact, network, unheard):.4f} nats per token from what it answered before")
    kept = {"shape": state["shape"], "average": network.state_dict(), "counters": state["counters"]}
    save_state(kept, arguments.run / NAME)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
