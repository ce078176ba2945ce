"""The device tier: the newest version in the memory of the ranks' devices. `protocol.device_tier` has the rule."""
