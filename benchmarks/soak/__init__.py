"""The soak: random faults on random configurations, each run compared with the undisturbed one."""
