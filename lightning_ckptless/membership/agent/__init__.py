"""The agent of one node: it watches its workers and replaces those that are lost."""
