"""The membership of a trainer in its run: arena, members, identity."""
