"""Storage and transfer of the mirrored state: arenas, layouts, transports, the mirror and the restore."""
