"""Whether the history fits into memory, checked with the first version, before the first step.

The first version has no optimizer state yet. What the optimizers will hold is estimated by their kind, so that a run
whose history does not fit is refused at once, and not when the first step is done.

Apart from `mirroring`, because the arithmetic needs neither a trainer nor an arena.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ckptless.errors import ArenaError
from lightning_ckptless.protocol.placement_table import as_size
from lightning_ckptless.replica.arena import LEAST_SLOTS

_VALUES_PER_PARAMETER: Mapping[str, int] = {
    "Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Adagrad": 1, "Adadelta": 2, "RMSprop": 1,
}  # fmt: skip
"""Tensors of a parameter's size that an optimizer keeps; SGD keeps one if it has momentum, others are taken as none."""


def expected_growth(optimizers: Sequence[Any], weight_bytes: int) -> float:
    """Estimate by how much the state grows with the first step, as a factor.

    Args:
        optimizers: optimizers of the trainer.
        weight_bytes: size of the state before it.
    """
    held = 0
    for optimizer in optimizers:
        values = _VALUES_PER_PARAMETER.get(type(optimizer).__name__, 0)
        for group in optimizer.param_groups:
            count = values or int(bool(group.get("momentum")))
            held += count * sum(parameter.numel() * parameter.element_size() for parameter in group["params"])
    return 1.0 + held / max(1, weight_bytes)


def require_history_fits(ring_bytes: Sequence[int], growth: float, history: int, usable_bytes: int) -> None:
    """Refuse a history that does not fit into this node's memory.

    Args:
        ring_bytes: size of one version of each shard that this node keeps, once for each replica of it.
        growth: expected growth of the state with the first step.
        history: number of versions of the history.
        usable_bytes: memory that the slots of this node may use.

    Raises:
        ArenaError: it does not fit; the message contains the arithmetic.
    """
    version_bytes = growth * sum(ring_bytes)
    slots = LEAST_SLOTS + history
    if not history or slots * version_bytes <= usable_bytes:
        return
    most = max(0, int(usable_bytes // max(1.0, version_bytes)) - LEAST_SLOTS)
    raise ArenaError(
        f"history={history} does not fit: {LEAST_SLOTS} + {history} slots x {as_size(version_bytes)} (one version of "
        f"the {len(ring_bytes)} replicas on this node) = {as_size(slots * version_bytes)}, but {as_size(usable_bytes)} "
        f"are free: set history={most} or less, keep fewer copies, or enlarge the memory of the arenas"
    )
