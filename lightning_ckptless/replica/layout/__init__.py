"""How the state is cut into shards."""
