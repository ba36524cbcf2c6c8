"""Augmentation: of waveforms (speed, noise, reverberation) and of features (SpecAugment)."""
