"""The commit point of a step: a version is taken there."""
