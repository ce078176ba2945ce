"""Whether what options keep in device memory fits, checked with the first version, before the first step.

Apart from `device_tier`, because the arithmetic needs no tensors, and buffers for staging are included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from lightning_ckptless.errors import OptionsError
from lightning_ckptless.protocol.placement_table import as_size


def free_bytes_of(device: torch.device, ranks: int) -> int:
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


@dataclass(frozen=True)
class DeviceNeed:
    """What an option keeps in device memory.

    Args:
        option: the option and its value, e.g. `staging='device'`.
        instead: the value without which nothing is kept.
        purpose: what the memory is for.
        used_bytes: its size before the first step.
        shards: number of shards that it contains.
    """

    option: str
    instead: str
    purpose: str
    used_bytes: int
    shards: int


def require_fits(
    needs: Sequence[DeviceNeed], held_bytes: int, world_size: int, growth: float, free_bytes: int, rank: int
) -> None:
    """Refuse options whose memory does not fit on the device.

    Args:
        needs: what they keep there.
        held_bytes: size of this rank's live tensors before the first step.
        world_size: number of shards of the state.
        growth: expected growth of the state with the first step, in which optimizers create their state.
        free_bytes: free memory of the device.
        rank: this rank.

    Raises:
        OptionsError: they do not fit; the message contains the arithmetic.
    """
    grown_bytes = (growth - 1.0) * held_bytes
    if growth * sum(need.used_bytes for need in needs) + grown_bytes <= free_bytes:
        return
    what = " and ".join(need.option for need in needs) + (" does" if len(needs) == 1 else " do")
    parts = ", ".join(
        f"{need.shards}/{world_size} of the state = {as_size(growth * need.used_bytes)} for {need.purpose}"
        for need in needs
    )
    raise OptionsError(
        f"rank {rank}: {what} not fit: {parts}, and {as_size(grown_bytes)} for the optimizers, but "
        f"{as_size(free_bytes)} of device memory are free: keep fewer copies, free memory, or set "
        f"{' or '.join(need.instead for need in needs)}"
    )
