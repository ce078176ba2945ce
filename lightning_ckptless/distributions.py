"""The two distributions of Lightning: same code, different classes."""

from __future__ import annotations

LIGHTNING = "lightning.pytorch"
PYTORCH_LIGHTNING = "pytorch_lightning"
DISTRIBUTIONS = (LIGHTNING, PYTORCH_LIGHTNING)
"""By the names of their top modules."""
PYPI_NAMES = {LIGHTNING: "lightning", PYTORCH_LIGHTNING: "pytorch-lightning"}
CLASSES = {LIGHTNING: "lightning_ckptless.lightning_pytorch", PYTORCH_LIGHTNING: "lightning_ckptless.pytorch_lightning"}
"""Our modules with the public classes for each."""
