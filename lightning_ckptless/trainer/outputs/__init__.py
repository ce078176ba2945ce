"""The outputs of a run that are rolled back with it: log rows, log files and checkpoint files."""
