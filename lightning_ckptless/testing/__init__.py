"""Tools to try a training run: digests of its state, comparison bit by bit, and drills with injected faults."""
