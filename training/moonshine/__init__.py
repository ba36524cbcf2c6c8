"""Moonshine (Jeffries et al. 2024): small networks that were taught on clips of their own length."""
