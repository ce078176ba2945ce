"""The strategies that users name, and how `fit` is entered."""
