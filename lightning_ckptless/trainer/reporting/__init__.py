"""What a run reports, and the files that it writes."""
