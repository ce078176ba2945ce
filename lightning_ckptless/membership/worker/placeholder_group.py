"""A placeholder process group for a replacement that has not joined the other ranks yet.

User code in that phase may ask torch.distributed for its rank and the world size, as a `DistributedSampler` does. A
barrier returns at once: the other ranks passed it long ago. A collective that would exchange data raises, because the
other ranks do not take part. This is remembered even if user code handles the exception: the process then does not join
the other ranks, and all ranks are relaunched.
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
    """Check that this process has called no collective while it was alone.

    Raises:
        TransportError: it has called a collective, and may have continued without its result.
    """
    if _refused:
        raise _error(_refused[0])


def refuse(operation: str) -> TransportError:
    """Remember an operation that needs other ranks, and return the error for it."""
    _refused.append(operation)
    return _error(operation)


def _error(operation: str) -> TransportError:
    return TransportError(
        f"{operation} was called before training by a new process that replaces a lost rank and has not joined the "
        "other ranks yet: all ranks are relaunched. To allow recovery in place, call collectives only in the training "
        "loop"
    )


class AloneGroup(dist.ProcessGroup):
    """A process group that knows its rank and size, and exchanges no data."""

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
    """The store of a group without other ranks. It has no methods, so whatever needs one fails instead of waiting."""


def _group(_store: Store, rank: int, world_size: int, _timeout: timedelta) -> AloneGroup:
    return AloneGroup(rank, world_size)  # type: ignore[call-arg]  # the stub leaves this constructor out


def open_alone(rank: int, world_size: int) -> None:
    """Create the placeholder as the default process group.

    Args:
        rank: rank that the process will have among the other ranks.
        world_size: number of ranks.
    """
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _group, devices=["cpu", "cuda"])
    _refused.clear()
    dist.init_process_group(BACKEND, store=_NoStore(), rank=rank, world_size=world_size)
