"""Lightning's wrapper that distributes a user's sampler over the ranks."""

from __future__ import annotations

from typing import Any


def sampler_inside(sampler: Any) -> Any:
    """Return the user's sampler inside Lightning's distributed wrapper; None for any other sampler."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", None)
