"""A Whisper encoder with a CTC head."""
