"""How the state is divided into shards."""
