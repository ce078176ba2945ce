"""The command `ckptless`: run, doctor, drill, status, export, clean, timeline."""
