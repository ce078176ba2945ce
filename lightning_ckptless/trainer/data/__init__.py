"""The exact position of the training data."""
