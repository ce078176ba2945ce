"""The page of `ckptless watch --web`."""
