"""What people run today, built from the same weights, so that `make bench-peers` compares like with like."""
