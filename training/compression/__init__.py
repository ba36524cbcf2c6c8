"""A Whisper with its decoder made small: fewer tokens and layers, true lengths, weights of four bits."""
