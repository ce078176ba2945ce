"""Launching: from a command line to an agent with workers."""
