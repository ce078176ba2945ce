"""Mirroring: write each version into the slots of its holders."""
