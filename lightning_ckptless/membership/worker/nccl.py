"""Environment variables by which NCCL's threads in torch end the process, or hold it, when a peer is lost.

Apart from where they are set, so that they can be looked at without torch.
"""

from __future__ import annotations

ENDS_THE_PROCESS = (
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
    "TORCH_NCCL_ENABLE_MONITORING",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS",
    # How long its watchdog waits for a dump that is never made, before it lets a group be left.
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC",
)
