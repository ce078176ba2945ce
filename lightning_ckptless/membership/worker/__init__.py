"""What a worker does in addition to running the script: listen to its agent, report progress, create groups."""
