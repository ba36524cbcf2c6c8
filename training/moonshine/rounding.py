"""Stage 3: weights of four bits that change least of what the network answers.

    python -m training.moonshine.rounding --run RUN --cache CACHE --labels LABELS [--mean-with OTHER SHARE]

As :mod:`training.compression.rounding` does it for a Whisper. Writes ``rounded.pt`` beside ``last.pt``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from training.arguments import positive
from training.compression.rounding import (
    JUDGED_BATCHES,
    NAME,
    SEED,
    divergence,
    mean_with,
    not_rounded,
    round_layers,
    share_of,
    stages,
)
from training.compression.train import read_state
from training.equalise import equalise
from training.errors import ConfigError, in_one_line
from training.moonshine.corpus import MoonshineCorpus, SampleMaker
from training.moonshine.model import Moonshine
from training.moonshine.train import MoonshineConfig, answers, network_of, new_network
from training.torch_state import save_state


@in_one_line("rounding")
def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="of training.moonshine.train")
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
    arguments = parser.parse_args(given)
    state = read_state(arguments.run / "last.pt")
    corpus = MoonshineCorpus(arguments.cache, arguments.labels)
    network = network_of(state, corpus.cut)
    config = MoonshineConfig(layers=tuple(state["config"]["layers"]))

    def other(name: str) -> Moonshine:
        if name.endswith(".pt"):
            found = network_of(not_rounded(Path(name)), corpus.cut)
        else:
            found = new_network(name, config, corpus.cut)
        if found.shape != network.shape:
            raise ConfigError(f"--mean-with {name}: {found.shape}; {arguments.run} has {network.shape}")
        return found

    mean_with(network, [(other(name), share_of(share)) for name, share in arguments.mean_with])
    maker = SampleMaker(corpus, config.batch_s, SEED, network.most_tokens, masked=False)
    drawn = (maker(step) for step in range(arguments.batches))
    batches = [(batch.features, batch.lengths, batch.tokens) for batch in drawn]
    equalise(network)
    exact = copy.deepcopy(network)
    with tqdm(total=len(list(stages(network))), unit="layer", desc="rounding") as bar:
        round_layers(network, batches, lambda name: bar.update())
    unheard = [maker(arguments.batches + step) for step in range(JUDGED_BATCHES)]
    apart = divergence(exact, network, unheard, answers)
    print(f"{apart:.4f} nats per token from what it answered before")
    kept = {"shape": state["shape"], "average": network.state_dict(), "counters": state["counters"]}
    save_state(kept, arguments.run / NAME)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
