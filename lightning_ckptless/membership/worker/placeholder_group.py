"""A default process group for a process that is about to take a lost rank's place, and has not met the other ranks yet.

User code in that phase may ask torch.distributed for its rank and for the world size, as a `DistributedSampler` does. A
barrier returns at once: the other ranks have passed it long ago. Data cannot be exchanged, since the other ranks do not
take part: a collective that would do so raises, and is remembered even where the user's code handles the exception.
Such a process does not join the others, and all ranks are started again.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from lightning_ckptless.errors import TransportError
from lightning_ckptless.internals.torch_internals import finished_work

BACKEND = "ckptless_alone"
_COLLECTIVES = (
    "_allgather_base",
    "_reduce_scatter_base",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "broadcast",
    "gather",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)

_refused: list[str] = []


def require_no_refusals() -> None:
    """Look back at what this process has asked for while it was alone.

    Raises:
        TransportError: it has asked for a collective, and may have gone on without its result.
    """
    if _refused:
        raise _error(_refused[0])


def refuse(operation: str) -> TransportError:
    """The error for an operation that needs other ranks, which is remembered."""
    _refused.append(operation)
    return _error(operation)


def _error(operation: str) -> TransportError:
    return TransportError(
        f"{operation} was called before training by a new process that takes the place of a lost rank, and has not met "
        "the other ranks yet: all ranks are started again. To be replaced in place, call collectives in the training "
        "loop only"
    )


class AloneGroup(dist.ProcessGroup):
    """A process group that knows its rank and size, and exchanges nothing."""

    def barrier(self, *_: Any, **__: Any) -> Any:
        """Return at once."""
        return finished_work()


def _refusing(name: str) -> Callable[..., Any]:
    def refusing(_self: Any, *_: Any, **__: Any) -> Any:
        raise refuse(f"the collective {name.strip('_')}")

    return refusing


for _name in _COLLECTIVES:
    setattr(AloneGroup, _name, _refusing(_name))


class _NoStore(Store):
    """Of a group without other ranks. It has no methods of a store: whatever needs them fails, and does not wait."""


def _group(_store: Store, rank: int, world_size: int, _timeout: timedelta) -> AloneGroup:
    return AloneGroup(rank, world_size)  # type: ignore[call-arg]  # the stub leaves this constructor out


def open_alone(rank: int, world_size: int) -> None:
    """Make the default process group of a process that is alone.

    Args:
        rank: that it is to have among the others.
        world_size: number of ranks.
    """
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _group, devices=["cpu", "cuda"])
    _refused.clear()
    dist.init_process_group(BACKEND, store=_NoStore(), rank=rank, world_size=world_size)
