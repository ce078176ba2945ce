"""Peer errors: telling a lost peer from a user's error by the messages of torch and gloo when a connection ends."""

from __future__ import annotations

import torch.distributed as dist

from lightning_ckptless.errors import TransportError

# gloo raises plain RuntimeErrors; these texts identify those from its transport and from the store.
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
    """Whether an exception, or any exception in its chain of causes, means that another rank is lost."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError | TransportError):
            return True
        if isinstance(seen, RuntimeError) and any(sign in str(seen) for sign in _SIGNS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
