"""Process groups, made anew for every generation under a store prefix of its own.

A store that outlives its workers (torchrun shares one over all its restarts) still holds the addresses of the dead:
a group that reads them fails or hangs. Under a fresh prefix there is nothing old to read.
"""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lightning_ckptless import environment
from lightning_ckptless.membership.generation import join_generation

JOIN_TIMEOUT_S = 600.0


def open_world(
    *, rank: int, world_size: int, backend: str, timeout: timedelta | None, device: torch.device | None
) -> int:
    """Join the current generation and create its default process group, once per process.

    Args:
        rank: this worker's rank.
        world_size: number of ranks.
        backend: of the default group, e.g. `gloo` or `nccl`.
        timeout: for collectives; None for torch's default.
        device: bound to the group where the backend wants it; None on the host.

    Returns:
        Number of the generation.

    Raises:
        TransportError: not all ranks came.
    """
    if dist.is_initialized():
        # A second trainer of the same program, in a membership that the first one has joined.
        return int(os.environ.get(environment.GENERATION, "1"))
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timedelta(seconds=JOIN_TIMEOUT_S)))
    generation = join_generation(store, rank, world_size, JOIN_TIMEOUT_S)
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    dist.init_process_group(
        backend, store=generation.store, rank=rank, world_size=world_size, device_id=device, **options
    )
    atexit.register(close_world)
    os.environ[environment.GENERATION] = str(generation.number)
    return generation.number


def close_world() -> None:
    """Destroy the default process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def host_group(timeout_s: float) -> dist.ProcessGroup | None:
    """A gloo group over all ranks for state in host memory, apart from the training's own collectives."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return group if isinstance(group, dist.ProcessGroup) else None


def use_loopback_on_one_node(local_world_size: int, world_size: int) -> None:
    """Keep gloo on the loopback interface where all ranks are on this machine and no interface was chosen."""
    if local_world_size == world_size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
