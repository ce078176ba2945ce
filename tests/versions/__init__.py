"""The versions of Python, torch and Lightning that are supported, each tried in an environment of its own."""
