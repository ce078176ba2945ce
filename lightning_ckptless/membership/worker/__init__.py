"""What a worker does beside the program: it hears its agent, shows its progress, and makes process groups."""
