"""Going back to an earlier step on all ranks, on request."""
