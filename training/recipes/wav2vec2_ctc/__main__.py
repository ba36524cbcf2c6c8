"""`python -m training.recipes.wav2vec2_ctc STAGE --config FILE --run FOLDER`."""

import sys

from training.recipes.wav2vec2_ctc.recipe import Wav2Vec2Recipe
from training.stages.command import main

if __name__ == "__main__":
    sys.exit(main(Wav2Vec2Recipe))
