"""Tools to try a training run: faults on purpose, traces of every step, comparison bit by bit, and drills."""
