"""Tools to test a training run: fault injection, traces of every step, bit-for-bit comparison, and drills."""
