"""Everything private in Lightning that we touch, and nothing else.

Read at lightning 2.6.6. Each name used here has a test in `tests/trainer/test_host.py` that fails loudly when a new
version moves it. The rest of the package talks to Lightning through its public interface and through this room.
"""
