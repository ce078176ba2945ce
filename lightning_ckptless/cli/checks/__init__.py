"""The checks of `ckptless doctor`, by subject: facts of this machine are read in one place and judged in another."""
