"""`python -m training.recipes.whisper_seq2seq STAGE --config FILE --run FOLDER`."""

import sys

from training.recipes.whisper_seq2seq.recipe import WhisperSeq2SeqRecipe
from training.stages.command import main

if __name__ == "__main__":
    sys.exit(main(WhisperSeq2SeqRecipe))
