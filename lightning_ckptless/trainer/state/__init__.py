"""The state of a trainer, captured and put back."""
