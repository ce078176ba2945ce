"""Operating system interfaces: /proc, control groups, files of anonymous memory, and private files."""
