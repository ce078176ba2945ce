"""What the benchmarks share: jobs in processes, the notes that they send, kills, and the report."""
