"""The names of our strategies, made known to Lightning when torch is imported."""
