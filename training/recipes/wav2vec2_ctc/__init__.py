"""wav2vec2 of the XLSR kind, fine-tuned with CTC."""
