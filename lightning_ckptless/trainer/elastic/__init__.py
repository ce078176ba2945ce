"""Restoring a version on a different number of ranks."""
