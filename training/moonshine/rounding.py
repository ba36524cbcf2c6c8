"""Stage 3: weights of four bits that change least of what the network answers.

    python -m training.moonshine.rounding --run RUN --cache CACHE --labels LABELS [--mean-with OTHER SHARE]

As :mod:`training.compression.rounding` does it for a Whisper. Writes ``rounded.pt`` beside ``last.pt``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from training.compression.rounding import (
    SEED,
    add_options,
    mean_with,
    not_rounded,
    round_and_keep,
    share_of,
)
from training.compression.train import read_state
from training.errors import ConfigError, in_one_line
from training.moonshine.corpus import MoonshineCorpus, SampleMaker
from training.moonshine.model import Moonshine
from training.moonshine.train import MoonshineConfig, answers, learned, network_of, new_network


def mean_as_told(
    network: Moonshine, arguments: argparse.Namespace, corpus: MoonshineCorpus, layers: Sequence[int]
) -> None:
    """Give a network the mean that ``--mean-with`` asks for. Raises ConfigError, CheckpointError."""

    def other(name: str) -> Moonshine:
        if name.endswith(".pt"):
            found = learned(not_rounded(Path(name)), Path(name), corpus.cut)
        else:
            found = new_network(name, MoonshineConfig(layers=tuple(layers)), corpus.cut)
        if found.shape != network.shape:
            raise ConfigError(f"--mean-with {name}: {found.shape}; its like has {network.shape}")
        return found

    mean_with(network, [(other(name), share_of(share)) for name, share in arguments.mean_with])


@in_one_line("rounding")
def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    arguments = parser.parse_args(given)
    state = read_state(arguments.run / "last.pt")
    corpus = MoonshineCorpus(arguments.cache, arguments.labels)
    network = network_of(state, corpus.cut)
    mean_as_told(network, arguments, corpus, state["config"]["layers"])
    maker = SampleMaker(corpus, MoonshineConfig.batch_s, SEED, network.most_tokens, masked=False)
    round_and_keep(network, state, maker, answers, arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
