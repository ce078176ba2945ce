"""What a rank does after a fault, from the cut to the next step."""
