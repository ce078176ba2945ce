"""The durable rung: versions of a run's state in storage, and as files that others can read."""
