"""Digests of tensors and plain data that are equal only if every bit is equal.

A digest distinguishes values that `==` does not (`0.0` and `-0.0`, `1` and `1.0`, float32 and float64), and ignores
what does not affect training: strides, devices, the order of a mapping's keys.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
import xxhash

_ATOMS = (bool, int, float, complex, str, bytes, bytearray, PurePath, torch.dtype, torch.device)


def digest_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest named tensors by name, dtype, shape and bytes.

    Args:
        tensors: tensors of any dtype, shape, layout and device.

    Returns:
        16 hexadecimal digits.
    """
    state = xxhash.xxh3_64()
    for name in sorted(tensors):
        _feed_bytes(state, b"name", name.encode())
        _feed_tensor(state, tensors[name])
    return state.hexdigest()


def digest_values(value: Any) -> str:
    """Digest plain data, which may be nested and may contain tensors and arrays.

    Any other object counts only by the name of its class, as its `repr` may contain its address.

    Returns:
        16 hexadecimal digits.
    """
    state = xxhash.xxh3_64()
    _feed(state, value)
    return state.hexdigest()


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        _feed_tensor(state, value)
    elif isinstance(value, np.ndarray | np.generic):
        _feed_array(state, np.asarray(value))
    elif isinstance(value, enum.Enum):
        _feed_bytes(state, b"enum", f"{type(value).__name__}.{value.name}".encode())
    elif value is None or isinstance(value, _ATOMS):
        _feed_atom(state, value)
    else:
        _feed_container(state, value)


def _feed_atom(state: Any, value: Any) -> None:
    if isinstance(value, float):
        _feed_bytes(state, b"float", struct.pack("<d", value))
    elif isinstance(value, complex):
        _feed_bytes(state, b"complex", struct.pack("<dd", value.real, value.imag))
    elif isinstance(value, bytes | bytearray):
        _feed_bytes(state, b"bytes", bytes(value))
    elif isinstance(value, PurePath):
        _feed_bytes(state, b"path", str(value).encode())
    else:
        _feed_bytes(state, type(value).__name__.encode(), str(value).encode())


def _feed_container(state: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        # Keys of different types cannot be sorted, but their digests can.
        entries = sorted((digest_values(key), digest_values(item)) for key, item in value.items())
        _feed_bytes(state, b"mapping", "".join(key + item for key, item in entries).encode())
    elif isinstance(value, set | frozenset):
        _feed_bytes(state, b"set", "".join(sorted(digest_values(item) for item in value)).encode())
    elif isinstance(value, list | tuple | deque):
        _feed_sequence(state, b"sequence", iter(value), len(value))
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
        _feed_sequence(state, type(value).__name__.encode(), iter(items), len(items))
    else:
        _feed_bytes(state, b"object", f"{type(value).__module__}.{type(value).__qualname__}".encode())


def _feed_sequence(state: Any, kind: bytes, items: Iterator[Any], length: int) -> None:
    _feed_bytes(state, kind, str(length).encode())
    for item in items:
        _feed(state, item)


def _feed_tensor(state: Any, tensor: torch.Tensor) -> None:
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    _feed_bytes(state, b"tensor", f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}".encode())
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        _feed_tensor(state, tensor.indices())
        _feed_tensor(state, tensor.values())
    elif tensor.is_quantized:
        _feed_tensor(state, tensor.int_repr())
        _feed_tensor(state, tensor.dequantize())
    else:
        state.update(_bytes_of(tensor))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    plain = tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data if plain.numel() else memoryview(b"")


def _feed_array(state: Any, array: np.ndarray[Any, Any]) -> None:
    if array.dtype.hasobject:
        _feed(state, array.tolist())
        return
    _feed_bytes(state, b"array", f"{array.dtype.str} {array.shape}".encode())
    state.update(np.ascontiguousarray(array).tobytes())


def _feed_bytes(state: Any, kind: bytes, data: bytes) -> None:
    """Feed bytes with their kind and length as a prefix, so that adjacent values cannot be confused."""
    state.update(b"%s:%d:" % (kind, len(data)))
    state.update(data)
