"""Rewinding all ranks to an earlier step, on request."""
