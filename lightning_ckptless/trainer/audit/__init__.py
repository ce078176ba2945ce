"""Finding ranks whose state or whose arithmetic is wrong: replicas that differ, and micro-batches run twice."""
