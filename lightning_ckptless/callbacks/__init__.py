"""Callbacks to try a run with: faults on purpose, and a digest of every step."""
