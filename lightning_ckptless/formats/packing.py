"""Pickles host state: plain values, with tensors as bytes and enumeration members as data."""

from __future__ import annotations

import ast
import enum
import importlib
import io
import itertools
import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from lightning_ckptless.formats.pickles import Packed, found_in_program, is_enumeration
from lightning_ckptless.internals.torch_internals import storage_bytes, storage_of

KINDS: set[Any] = set()
"""Classes and functions that this process has packed so far, except the most common ones. A pickle needs a new check
only if it adds to them."""
_BY_DEFAULT: set[type] = set()
"""Those of them whose instances are all written in the default way."""


class SmallTensorPickler(pickle.Pickler):
    """Writes a tensor as bytes, ten times as fast as torch's own reduction for a scalar."""

    def reducer_override(self, value: Any) -> Any:
        """Return how to write a value; `NotImplemented` for the default."""
        kind = type(value)
        if kind in _BY_DEFAULT:
            return NotImplemented
        if kind is torch.Tensor and value.layout is torch.strided and not value.is_quantized:
            return rebuild_tensor, (_bytes_of(value), value.dtype, tuple(value.shape), value.device.type)
        if kind in (torch.TypedStorage, torch.UntypedStorage):
            # Torch would write a pickle inside the pickle.
            return rebuild_storage, storage_bytes(value)
        if isinstance(value, enum.Enum) and found_in_program(kind.__module__, kind.__qualname__) is kind:
            return member, (kind.__module__, kind.__qualname__, value.value)
        if kind is itertools.count:
            # Later versions of Python cannot pickle it.
            start = ast.literal_eval(repr(value).removeprefix("count"))
            return kind, start if isinstance(start, tuple) else (start,)
        if isinstance(value, type | FunctionType):
            KINDS.add(value)
        else:
            KINDS.add(kind)
            if kind is not torch.Tensor and not issubclass(kind, enum.Enum):
                _BY_DEFAULT.add(kind)
        return NotImplemented


def _bytes_of(tensor: torch.Tensor) -> bytes:
    try:
        data: bytes = tensor.detach().numpy().tobytes()
    except (TypeError, RuntimeError):
        # On a device, of a type that NumPy lacks, or conjugated or negated only when it is read.
        host = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        data = host.view(-1).view(torch.uint8).numpy().tobytes() if host.numel() else b""
    return data


def pack(value: Any) -> Packed:
    """Pickle a value. Tensors keep their values and device type, but not their graph, strides and views."""
    out = io.BytesIO()
    SmallTensorPickler(out, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return Packed(out.getvalue())


def unpack(data: Packed, beside: Callable[[Any], Any] | None = None) -> Any:
    """Unpickle a packed value.

    Args:
        data: bytes from this process, from the memory of another process on this host, or admitted by `pickles.admit`.
        beside: returns an object that the pickle refers to, by its persistent id; None for none.

    Raises:
        TypeError: the origin of the bytes is unknown.
    """
    if type(data) is not Packed:
        raise TypeError(f"refusing to unpickle a {type(data).__name__} of {len(data)} bytes of unknown origin")
    return pickle.loads(data) if beside is None else _Referring(data, beside).load()


class Part:
    """A packed value as part of another: packed as its bytes, and unpacked as the value.

    Args:
        packed: the value.
    """

    def __init__(self, packed: Packed) -> None:
        self.packed = packed

    def __reduce__(self) -> tuple[Any, ...]:
        return open_part, (bytes(self.packed),)


def open_part(data: bytes) -> Any:
    """Return the value of a part. The pickle that it is part of is of known origin, or admitted together with it."""
    return unpack(Packed(data))


class PartCache:
    """Packs a value once, and again only when it has changed."""

    def __init__(self) -> None:
        self._mark: Any = _UNMARKED
        self._part: Part | None = None

    def part(self, mark: Any, value: Any) -> Any:
        """Return a value to be packed as part of another.

        Args:
            mark: equal to that of the last call only if the value is the same.
            value: the value, which may refer to live objects.

        Returns:
            The pickle of the value. The value itself if it is small, at first, and whenever it has changed, so that
            what always changes is not packed twice.
        """
        if self._mark != mark:
            self._mark, self._part = mark, None
            return value
        if self._part is None:
            self._part = Part(pack(value))
        return self._part if len(self._part.packed) >= LEAST_BYTES else value


_UNMARKED = object()
LEAST_BYTES = 256
"""A smaller pickle is written faster again than as a part."""


class _Referring(pickle.Unpickler):
    def __init__(self, data: Packed, beside: Callable[[Any], Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._beside = beside

    def persistent_load(self, persistent_id: Any) -> Any:
        return self._beside(persistent_id)


def rebuild_tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Rebuild a tensor from its bytes."""
    if not data:
        return on_device(torch.empty(shape, dtype=dtype), device)
    return on_device(torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape), device)


def rebuild_storage(data: bytes, dtype: torch.dtype | None, device: str) -> Any:
    """Rebuild the storage of a tensor."""
    host = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return storage_of(on_device(host, device), dtype)


def on_device(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Move a tensor to its original type of device, or leave it on the host if that is not available."""
    return tensor if device == "cuda" and not torch.cuda.is_available() else tensor.to(device)


def member(module: str, name: str, value: Any) -> Any:
    """Return a member of an enumeration of the script.

    Raises:
        TypeError: the name does not refer to an enumeration.
    """
    kind = found_in_program(module, name)
    if kind is None:
        importlib.import_module(module)
        kind = found_in_program(module, name)
    if not is_enumeration(kind):
        raise TypeError(f"{module}.{name}: expected an enumeration, as when the state was written, found {kind!r}")
    return kind(value)
