"""`python -m training.recipes.quartznet_ctc STAGE --config FILE --run FOLDER`."""

import sys

from training.recipes.quartznet_ctc.recipe import QuartzNetRecipe
from training.stages.command import main

if __name__ == "__main__":
    sys.exit(main(QuartzNetRecipe))
