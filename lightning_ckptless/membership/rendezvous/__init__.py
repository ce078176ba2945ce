"""Rendezvous: where the agents of a run meet, and the generations that they form."""
