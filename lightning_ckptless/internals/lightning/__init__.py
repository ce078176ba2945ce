"""All uses of private names of Lightning.

Each name has a test in `tests/internals/test_lightning.py` that fails if a new version lacks it. Most are listed in
`names` and checked when a strategy is created. Differences between the supported versions are in `versions`. The rest
of the package uses Lightning's public interface and this sub-package.
"""
