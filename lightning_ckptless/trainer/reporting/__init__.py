"""What a run says about itself, and the files that it writes."""
