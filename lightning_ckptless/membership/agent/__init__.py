"""The agent of one node: it starts workers, detects faults, and recovers from them."""
