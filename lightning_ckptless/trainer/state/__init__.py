"""The state of a trainer: capture and restore."""
