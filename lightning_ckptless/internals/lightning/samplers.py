"""Samplers that Lightning puts around a user's own, so that each rank takes its share of it."""

from __future__ import annotations

from typing import Any


def sampler_inside(sampler: Any) -> Any:
    """The user's sampler inside Lightning's wrapper for distributed training; None for any other sampler."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", None)
