"""The state of a run: reading it, and what follows from it."""
