"""Whisper as it was meant: encoder and decoder, served as one graph."""
