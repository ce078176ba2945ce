"""Durable states: versions of a run's state in storage, and their export to formats of other tools."""
