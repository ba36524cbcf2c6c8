"""Conformer and FastConformer, fine-tuned with CTC."""
