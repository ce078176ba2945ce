"""What a rank does after a fault, from the aborted step to the next one."""
