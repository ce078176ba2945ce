"""Environment variables that make torch's NCCL threads end or block the process when a peer is lost.

Separate from the code that sets them, so that they can be listed without importing torch.
"""

from __future__ import annotations

ENDS_THE_PROCESS = (
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
    "TORCH_NCCL_ENABLE_MONITORING",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS",
    # How long its watchdog waits for a dump that is never written, before a group can be released.
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC",
)
