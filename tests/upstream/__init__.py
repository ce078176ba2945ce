"""Lightning's own tests, run with our strategy in the place of DDP and compared with DDP: `make test-lightning`."""
