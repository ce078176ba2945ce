"""What the operating system says: processes, control groups, files that no other user can have written."""
