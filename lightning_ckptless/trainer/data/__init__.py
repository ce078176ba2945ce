"""The exact position in the training data."""
