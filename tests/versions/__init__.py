"""Tests the supported versions of Python, torch and Lightning, each in its own environment: `make test-versions`."""
