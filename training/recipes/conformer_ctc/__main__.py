"""`python -m training.recipes.conformer_ctc STAGE --config FILE --run FOLDER`."""

import sys

from training.recipes.conformer_ctc.recipe import ConformerRecipe
from training.stages.command import main

if __name__ == "__main__":
    sys.exit(main(ConformerRecipe))
