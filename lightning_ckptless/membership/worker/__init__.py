"""What a worker does besides running the script: it listens to its agent, reports progress and creates groups."""
