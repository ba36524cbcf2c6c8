"""`python -m training.recipes.NAME STAGE --config FILE --run FOLDER`, the same for every recipe.

Each stage leaves its results in the run folder and can be called again: what is done is not done twice, and
an interrupted training goes on from its last epoch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from training.config import load_config
from training.data.manifest import Utterance
from training.errors import in_one_line
from training.loop.run_folder import RunFolder, open_run
from training.stages.benchmark import benchmark
from training.stages.export import export
from training.stages.prepare import prepare
from training.stages.publish import publish
from training.stages.quantize import quantize
from training.stages.recipe import Recipe
from training.stages.train import fits_one_file, store_weights, train

Stage = Callable[[Recipe, dict[str, list[Utterance]], RunFolder], object]


def convert(recipe: Recipe, _rows: dict[str, list[Utterance]], folder: RunFolder) -> Path:
    """Instead of training: take the weights that training would start from as they are."""
    codec = recipe.codec()
    network = recipe.network(codec)
    fits_one_file(network)
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    folder.forget("train.json")  # or `train` would take these weights for its own
    return store_weights(weights, folder)


STAGES: dict[str, Stage] = {
    "prepare": lambda recipe, rows, folder: {part: len(found) for part, found in rows.items()},
    "train": train,
    "export": export,
    "quantize": quantize,
    "benchmark": benchmark,
    "publish": publish,
}


def run(
    recipe_type: type[Recipe], config: Path, folder: Path, stage: str, changes: Sequence[str] = ()
) -> object:
    """Do one stage, or "all" in order; returns what the last one gave. Raises TrainingError."""
    checked = load_config(config, changes)
    recipe = recipe_type(checked)
    opened = open_run(folder, {"recipe": recipe.name, **checked.model_dump(mode="json")})
    rows = prepare(recipe, opened)
    result: object = None
    for name in STAGES if stage == "all" else (stage,):
        print(f"--- {name}", flush=True)
        result = {**STAGES, "convert": convert}[name](recipe, rows, opened)
    return result


@in_one_line("error")
def main(recipe_type: type[Recipe], arguments: Sequence[str] | None = None) -> int:
    """The command; 0 when done, 2 with one message on standard error for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog=f"python -m training.recipes.{recipe_type.name}", description=recipe_type.__doc__
    )
    parser.add_argument("stage", choices=["all", *STAGES, "convert"])
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--run", type=Path, required=True, help="folder for everything the run writes")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change one field of the file",
    )
    given = parser.parse_args(arguments)
    result = run(recipe_type, given.config, given.run, given.stage, given.set)
    if isinstance(result, Path):
        print(result)
    return 0
