"""Telling a lost peer from an error of the user's: by what torch and gloo say when a connection ends."""

from __future__ import annotations

import torch.distributed as dist

from lightning_ckptless.errors import TransportError

# gloo raises plain RuntimeErrors; these are the places in its transport and in the store that they come from.
_SIGNS = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "connectFullMesh",
    "Broken pipe",
    "Timed out waiting",
    "NCCL communicator was aborted",
    "NCCL error",
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone, anywhere in its chain of causes."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError | TransportError):
            return True
        if isinstance(seen, RuntimeError) and any(sign in str(seen) for sign in _SIGNS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
