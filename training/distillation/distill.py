"""Stage 3: train the student on the cache.

    python -m training.distillation.distill --cache CACHE --run runs/NAME --size m --max-minutes 100

The learning rate warms up, stays, and falls to nothing over the last part of the run. The run's length is
``--steps``, or a wall-clock budget (``--max-minutes``, or ``--until HH:MM`` UTC) for machines whose speed is
shared. ``last.pt`` and ``best.pt`` in the run folder hold everything; the same command goes on from
``last.pt``, also after SIGTERM. ``--init-from FILE.safetensors`` (made by stage ``weights``) starts a new run
from published weights instead of random ones; going on with it, leave the option out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch

from training.arguments import positive_s
from training.distillation.examples import Corpus
from training.distillation.runner import begun_once, deadline, run_until
from training.distillation.student import SIZE_NAMES, corpus_type
from training.distillation.trainer import TrainConfig, Trainer
from training.errors import in_one_line


def _clock(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%H:%M")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected HH:MM") from None


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0, at most 1")
    return value


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """The command line that this stage and stage ``pieces`` share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, created or resumed")
    parser.add_argument("--size", choices=sorted(SIZE_NAMES), default=TrainConfig.size)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--until", type=_clock, help="HH:MM UTC")
    parser.add_argument("--batch-s", type=positive_s, default=TrainConfig.batch_s)
    parser.add_argument("--learning-rate", type=float, default=TrainConfig.learning_rate)
    parser.add_argument(
        "--decay-share", type=_share, default=TrainConfig.decay_share, help="of the run, 0 to 1"
    )
    parser.add_argument("--no-muon", action="store_true", help="AdamW for every weight")
    parser.add_argument("--output-only", action="store_true", help="no activations among the targets")
    parser.add_argument(
        "--frozen-norms",
        action="store_true",
        help="go on with statistics of the batch normalisations as they will be when it is used; Conformers",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=TrainConfig.workers, help="threads, each with a batch of its own"
    )
    parser.add_argument("--validate-every-minutes", type=float, default=5.0)
    parser.add_argument(
        "--init-from", type=Path, help="checkpoint (.safetensors), or OpenAI's own (.pt), to start from"
    )
    return parser


def run(arguments: argparse.Namespace, trainer_class: Callable[[TrainConfig, Corpus], Trainer]) -> None:
    """Train as the command line says, or go on with the run that is there.

    Raises SystemExit, ConfigError on misuse.
    """
    deadline_s = deadline(arguments.until, arguments.max_minutes)
    if arguments.steps is None and deadline_s is None:
        raise SystemExit("say how long: --steps, --max-minutes or --until")
    torch.set_num_threads(1)
    config = TrainConfig(
        size=arguments.size,
        workers=arguments.workers,
        muon=not arguments.no_muon,
        batch_s=arguments.batch_s,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        output_only=arguments.output_only,
        decay_share=arguments.decay_share,
        frozen_norms=arguments.frozen_norms,
    )
    last, frozen_before = arguments.run / "last.pt", False
    begun_once(last, arguments.init_from)
    trainer = trainer_class(config, corpus_type(config.size)(arguments.cache, config.min_confidence))
    if last.exists():
        state = torch.load(last, weights_only=True)
        if state["config"]["size"] != config.size:
            raise SystemExit(f"{last}: a student of size {state['config']['size']}, asked for {config.size}")
        trainer.restore(state)
        frozen_before = state["config"].get("frozen_norms", False)
        print(f"going on at step {trainer.step}")
    elif arguments.init_from:
        trainer.initialise_from(arguments.init_from)
    if config.frozen_norms:
        trainer.freeze_norms(anew=not frozen_before)
    arguments.run.mkdir(parents=True, exist_ok=True)
    (arguments.run / "config.json").write_text(json.dumps(asdict(config), indent=1), encoding="utf-8")
    run_until(trainer, arguments.run, arguments.steps, deadline_s, 60.0 * arguments.validate_every_minutes)


@in_one_line("distill")
def main() -> int:
    """Command line."""
    run(arguments_of(__doc__).parse_args(), Trainer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
