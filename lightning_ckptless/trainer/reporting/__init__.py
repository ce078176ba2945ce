"""What a run reports about itself: ledger events, logged values, the progress bar, its progress to the agent."""
