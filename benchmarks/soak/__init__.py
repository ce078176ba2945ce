"""The soak test: random faults in random configurations; each run is compared with an undisturbed one."""
