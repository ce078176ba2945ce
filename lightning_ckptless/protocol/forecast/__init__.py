"""The forecast: which goodput to expect from a cluster and its failures, and which options to choose."""
