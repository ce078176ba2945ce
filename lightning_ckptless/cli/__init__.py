"""The command `ckptless`: run, drill, status, clean, timeline."""
