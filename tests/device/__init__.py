"""Tests that need a CUDA device; they are skipped without one."""
