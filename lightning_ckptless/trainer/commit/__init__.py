"""Capturing versions at commit points, and bringing durable states back."""
