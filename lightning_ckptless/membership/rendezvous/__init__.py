"""Rendezvous: how the agents of a run find each other, and the generations that they form."""
