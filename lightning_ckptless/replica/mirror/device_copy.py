"""Copy from a CUDA device directly into slots, in a separate CUDA stream, concurrently with other work of the device.

To the device, a slot is pageable memory: copies into it go through a small driver buffer at a tenth of the speed, and
block the calling thread. Slots are therefore registered with the driver once, and then copied into at the speed of the
bus. If the driver refuses, for example because the memory cannot be locked, copies go through pinned buffers.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import torch

from lightning_ckptless.internals.torch_internals import foreach_copy

log = logging.getLogger(__name__)


class DeviceCopier:
    """Copies tensors of one device into slots.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._registered: dict[int, bool] = {}
        self._pinned: dict[int, torch.Tensor] = {}
        self._has_warned = False

    def copy(
        self, bulk: torch.Tensor, targets: list[torch.Tensor], sources: list[torch.Tensor], ready: torch.cuda.Event
    ) -> None:
        """Copy each source on the device into its target, and wait until all copies are done.

        Args:
            bulk: tensor state of the slot, of which the targets are views.
            targets: tensors in host memory.
            sources: tensors on the device, one per target.
            ready: event after which the sources contain the version.
        """
        direct = self._register(bulk)
        landing = targets if direct else [self._buffer(target) for target in targets]
        with torch.no_grad(), torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            foreach_copy(landing, sources, non_blocking=True)
        self._stream.synchronize()
        if not direct:
            with torch.no_grad():
                foreach_copy(targets, landing)

    def close(self) -> None:
        """Unregister the slots, which are about to be unmapped."""
        for address in [address for address, done in self._registered.items() if done]:
            _driver().cudaHostUnregister(address)
        self._registered.clear()

    def _register(self, bulk: torch.Tensor) -> bool:
        address = bulk.data_ptr()
        if address not in self._registered:
            status = _driver().cudaHostRegister(address, bulk.nbytes, 0)
            self._registered[address] = int(status) == 0
            if int(status):
                _forget_last_error(self._stream.device)
                self._warn(bulk.nbytes, status)
        return self._registered[address]

    def _warn(self, length_bytes: int, status: object) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "ckptless: %.1f MB of an arena cannot be registered with CUDA (%s): copies go through pinned buffers, "
                "which is slower. Use an arena folder in shared memory",
                length_bytes / 1e6,
                status,
            )

    def _buffer(self, target: torch.Tensor) -> torch.Tensor:
        held = self._pinned.get(target.data_ptr())
        if held is None or held.shape != target.shape or held.dtype != target.dtype:
            held = torch.empty(target.shape, dtype=target.dtype, pin_memory=True)
            self._pinned[target.data_ptr()] = held
        return held


def _forget_last_error(device: torch.device) -> None:
    """Start a no-op kernel, which clears the refusal that the driver keeps as the last error of this thread."""
    with suppress(RuntimeError):
        torch.ones(1, device=device)


def _driver() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
