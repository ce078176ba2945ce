"""Everything private in Lightning that we touch, and nothing else.

Each name has a test in `tests/internals/test_lightning.py` that fails loudly when a new version moves it. Most are
in `names`, and are checked when a strategy is made. What differs between the supported versions is in `versions`. The
rest of the package talks to Lightning through its public interface and through this room.
"""
