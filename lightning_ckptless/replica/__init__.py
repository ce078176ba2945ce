"""Where the bytes of the state live, and how they move: arenas, layouts, transports, the mirror and the restore."""
