"""The checks of `ckptless doctor`, one file per subject. Facts of this host are read and judged separately."""
