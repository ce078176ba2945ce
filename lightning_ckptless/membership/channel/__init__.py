"""What an agent and its workers say to each other."""
