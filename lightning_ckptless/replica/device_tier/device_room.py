"""Whether the device tier fits into memory, checked with the first version, before the first step.

Apart from `device_tier`, because the arithmetic needs no tensors.
"""

from __future__ import annotations

import psutil
import torch

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.placement_table import as_size


def room_bytes(device: torch.device, ranks: int) -> int:
    """Free memory of a device for one rank.

    Args:
        device: where the slots are.
        ranks: number of ranks that share the memory of this node; a CUDA device counts as one rank's own.
    """
    if device.type != "cuda":
        return int(psutil.virtual_memory().available) // ranks
    free_bytes, _ = torch.cuda.mem_get_info(device)
    # torch can reuse reserved memory that no tensor occupies.
    return int(free_bytes) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def require_room(slot_bytes: int, shards: int, world_size: int, growth: float, free_bytes: int, rank: int) -> None:
    """Refuse a device tier that does not fit.

    Args:
        slot_bytes: size of the slots now.
        shards: number of shards that this rank keeps.
        world_size: number of shards of the state.
        growth: expected growth of the state with the first step, in which optimizers create their state.
        free_bytes: free memory of the device.
        rank: this rank.

    Raises:
        OptionsError: it does not fit; the message contains the arithmetic.
    """
    needed_bytes = growth * slot_bytes
    # The first step also creates the optimizer state.
    grown_bytes = (growth - 1.0) * slot_bytes * world_size / max(1, shards)
    if needed_bytes + grown_bytes <= free_bytes:
        return
    raise OptionsError(
        f"rank {rank}: device_tier='on' does not fit: {shards}/{world_size} of the state = {as_size(needed_bytes)} for "
        f"the slots, and {as_size(grown_bytes)} for the optimizers, but {as_size(free_bytes)} of device memory are "
        "free: keep fewer copies, free memory, or set device_tier='off'"
    )
