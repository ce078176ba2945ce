"""Packs host state that is partly on a device without blocking the training thread on the device.

A running mean, a metric's counter or the last outputs of a model may be device tensors, to be computed after all the
work queued on the device. They are copied on the device, everything else is packed at once, and the mirror thread
fetches the copies later, where waiting delays no training.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch

from lightning_ckptless.formats.packing import SmallTensorPickler, on_device, pack, unpack
from lightning_ckptless.formats.pickles import Packed


def pack_late(value: Any) -> Packed | Callable[[], Packed]:
    """Pack plain data as of now; `unpack` reads the result.

    Returns:
        The bytes, or a function that returns them if some tensors are on a device. It may be called in any thread.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return pack(value)
    out = io.BytesIO()
    pickler = _DevicePickler(out)
    pickler.dump(value)
    if not pickler.aside:
        return Packed(out.getvalue())
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record()
    return _DeferredPack(Packed(out.getvalue()), pickler.aside, ready)


class _DevicePickler(SmallTensorPickler):
    def __init__(self, out: io.BytesIO) -> None:
        super().__init__(out, protocol=pickle.HIGHEST_PROTOCOL)
        self.aside: list[torch.Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if type(value) is not torch.Tensor or not value.is_cuda:
            return None
        self.aside.append(value.detach().clone())
        return len(self.aside) - 1


class _DeferredPack:
    """Host state that is packed except for its device tensors.

    Args:
        body: the pickle, with indices into `aside` instead of device tensors.
        aside: copies of those tensors, on the device.
        ready: recorded after the copies in the device's queue.
    """

    def __init__(self, body: Packed, aside: list[torch.Tensor], ready: torch.cuda.Event) -> None:
        self._body = body
        self._aside = aside
        self._ready = ready

    def __call__(self) -> Packed:
        """Wait for the copies and pack them with the rest."""
        stream = torch.cuda.Stream(self._aside[0].device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            stream.wait_event(self._ready)
            fetched = [tensor.cpu() for tensor in self._aside]
        devices = [tensor.device.type for tensor in self._aside]
        return pack(_Bundle(self._body, fetched, devices))


class _Bundle:
    """Unpacks as the original value."""

    def __init__(self, body: Packed, fetched: list[torch.Tensor], devices: list[str]) -> None:
        self._parts = body, fetched, devices

    def __reduce__(self) -> tuple[Any, ...]:
        return open_bundle, self._parts


def open_bundle(body: Packed, fetched: list[torch.Tensor], devices: list[str]) -> Any:
    """Return the value of a bundle."""
    tensors = list(map(on_device, fetched, devices))
    return unpack(body, lambda index: tensors[index])
