"""The engine of one `fit`, and what ties a worker to its run: arena, member set, identity, earlier calls."""
