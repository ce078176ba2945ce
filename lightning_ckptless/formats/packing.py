"""Packing host state: a pickle of plain values, with tensors as their bytes and members of enumerations as data."""

from __future__ import annotations

import enum
import importlib
import io
import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from lightning_ckptless.formats.pickles import Packed, found_in_program, is_enumeration
from lightning_ckptless.internals.torch_internals import storage_bytes, storage_of

KINDS: set[Any] = set()
"""The classes and functions that this process has packed so far, beside the commonest: a pickle of none but these was
looked at before."""


class SmallTensorPickler(pickle.Pickler):
    """Writes a tensor as its bytes: a tenth of the time that torch's own reduction takes for a scalar."""

    def reducer_override(self, value: Any) -> Any:
        """How a value is written; `NotImplemented` for the usual way."""
        kind = type(value)
        if kind is torch.Tensor and value.layout is torch.strided and not value.is_quantized:
            host = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            data = host.view(-1).view(torch.uint8).numpy().tobytes() if host.numel() else b""
            return rebuild_tensor, (data, value.dtype, tuple(value.shape), value.device.type)
        if kind in (torch.TypedStorage, torch.UntypedStorage):
            # Torch's own way is a pickle inside the pickle.
            return rebuild_storage, storage_bytes(value)
        if isinstance(value, enum.Enum) and found_in_program(kind.__module__, kind.__qualname__) is kind:
            return member, (kind.__module__, kind.__qualname__, value.value)
        KINDS.add(value if isinstance(value, type | FunctionType) else kind)
        return NotImplemented


def pack(value: Any) -> Packed:
    """Pickle a value. Tensors keep their values and kind of device, not their graph, strides and views."""
    out = io.BytesIO()
    SmallTensorPickler(out, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return Packed(out.getvalue())


def unpack(data: Packed, beside: Callable[[Any], Any] | None = None) -> Any:
    """The value that was packed.

    Args:
        data: of this process, of another one in the memory of this machine, or admitted.
        beside: finds by its place what the pickle refers to; None where it refers to nothing.

    Raises:
        TypeError: the bytes are from elsewhere.
    """
    if type(data) is not Packed:
        raise TypeError(f"a {type(data).__name__} of {len(data)} bytes is not unpickled: nothing says where it is from")
    return pickle.loads(data) if beside is None else _Referring(data, beside).load()


class _Referring(pickle.Unpickler):
    def __init__(self, data: Packed, beside: Callable[[Any], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._beside = beside

    def persistent_load(self, place: Any) -> Any:
        return self._beside(place)


def rebuild_tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """A tensor of some bytes."""
    if not data:
        return on_device(torch.empty(shape, dtype=dtype), device)
    return on_device(torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape), device)


def rebuild_storage(data: bytes, dtype: torch.dtype | None, device: str) -> Any:
    """The memory of a tensor of an unusual kind."""
    host = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return storage_of(on_device(host, device), dtype)


def on_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A tensor on the kind of device that it was on; on the host where a process without that device reads it."""
    return tensor if device == "cuda" and not torch.cuda.is_available() else tensor.to(device)


def member(module: str, name: str, value: Any) -> Any:
    """A member of an enumeration of the program.

    Raises:
        TypeError: the name is that of something else.
    """
    kind = found_in_program(module, name)
    if kind is None:
        importlib.import_module(module)
        kind = found_in_program(module, name)
    if not is_enumeration(kind):
        raise TypeError(f"{module}.{name} was an enumeration when the state was written, found {kind!r}")
    return kind(value)
