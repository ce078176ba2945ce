"""A version of another number of ranks."""
