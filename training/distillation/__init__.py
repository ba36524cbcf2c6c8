"""Small English models from the answers of a large one, on a CPU."""
