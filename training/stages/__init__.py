"""The stages of a run, one command each: prepare, train, export, quantize, benchmark, publish."""
