"""Runs Lightning's own tests with our strategy in place of DDP and compares the outcomes: `make test-lightning`."""
