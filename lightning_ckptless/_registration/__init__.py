"""Registers our strategies with Lightning when torch is imported."""
