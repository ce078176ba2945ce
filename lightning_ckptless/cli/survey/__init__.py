"""How the state of a run is read: what was read, and what follows from it."""
