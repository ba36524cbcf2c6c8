"""`python -m training.recipes.whisper_ctc STAGE --config FILE --run FOLDER`."""

import sys

from training.recipes.whisper_ctc.recipe import WhisperCtcRecipe
from training.stages.command import main

if __name__ == "__main__":
    sys.exit(main(WhisperCtcRecipe))
