"""The process that workers are forked from, and those that wait there."""
