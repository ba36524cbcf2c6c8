"""Stage 4: the averaged weights of a run as one small checkpoint, for export, ``--init-from`` and git.

    python -m training.distillation.weights --run runs/NAME --out student.safetensors

Half precision, the heads of training only left out. ``--average-with`` takes the mean with other students, as
with the one that the run went on from: between two points of one valley often lies a better one (Wortsman et
al., "Model soups", ICML 2022). Measure which is better on validation.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training.checkpoint import Checkpoint, average_weights, save_checkpoint
from training.distillation.dataset import ALPHABET
from training.distillation.label import COMPONENTS
from training.distillation.student import Distiller, student_of_size
from training.errors import in_one_line
from training.frontend import FrontendConfig
from training.vocabulary import CharacterCodec


def student_of(state: dict[str, Any], raw: bool = False) -> Checkpoint:
    """The student in a distillation checkpoint: the running average, or the last step's ``raw`` weights."""
    distiller = Distiller(student_of_size(state["config"]["size"]), COMPONENTS)
    distiller.load_state_dict(state["distiller" if raw else "average"])
    step, elapsed_s, audio_s, best_wer = state["counters"]
    meta = {
        "size": state["config"]["size"],
        "steps": step,
        "hours_seen": round(audio_s / 3600, 1),
        "training_minutes": round(elapsed_s / 60, 1),
        "best_validation_wer": best_wer if best_wer < 10 else None,
    }
    vocabulary = CharacterCodec(ALPHABET[1:]).vocabulary
    return Checkpoint(distiller.model.eval(), FrontendConfig(), vocabulary, meta)


def halved(checkpoint: Checkpoint) -> Checkpoint:
    """The same with float16 weights; batch statistics and positions stay float32."""
    model = copy.deepcopy(checkpoint.model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    return Checkpoint(model, checkpoint.frontend, checkpoint.vocabulary, checkpoint.meta)


@in_one_line("weights")
def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--checkpoint", default="last.pt", help="last.pt or best.pt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--raw", action="store_true", help="the last step's weights instead of the average")
    parser.add_argument("--average-with", type=Path, nargs="+", default=[], help="students of the same size")
    arguments = parser.parse_args(given)
    state = torch.load(arguments.run / arguments.checkpoint, weights_only=True)
    checkpoint = student_of(state, arguments.raw)
    save_checkpoint(arguments.out, halved(checkpoint))
    if arguments.average_with:
        checkpoint.model.load_state_dict(average_weights([arguments.out, *arguments.average_with]))
        meta = {**checkpoint.meta, "averaged_with": len(arguments.average_with)}
        save_checkpoint(arguments.out, halved(dataclasses.replace(checkpoint, meta=meta)))
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB, {checkpoint.meta}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
