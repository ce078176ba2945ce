"""Writes the safetensors format: eight bytes with the length of the header, the header as JSON, then the tensors.

Implemented here to avoid a dependency, as the format is simple: https://github.com/huggingface/safetensors#format
Apart from the export, because it knows the format and nothing of this package's state.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from lightning_ckptless.errors import DurableError
from lightning_ckptless.replica.checksum import bytes_of

_ALIGNMENT_BYTES = 8
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.uint16: "U16", torch.uint32: "U32",
    torch.uint64: "U64",
}  # fmt: skip


def write_safetensors(tensors: Mapping[str, Tensor], facts: Mapping[str, str], file: BinaryIO) -> None:
    """Write tensors in the order of their names.

    Args:
        tensors: tensors in host memory, by name.
        facts: metadata for the header.
        file: file to write to.

    Raises:
        DurableError: the format does not support a dtype.
    """
    head: dict[str, object] = {"__metadata__": dict(facts)}
    at = 0
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype not in _NAMES:
            raise DurableError(f"{name} is {tensor.dtype}, not supported by safetensors: use format lightning or dcp")
        head[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    file.write(struct.pack("<Q", len(text)) + text)
    for _, tensor in sorted(tensors.items()):
        if tensor.numel():
            file.write(bytes_of(tensor.contiguous().view(-1).view(torch.uint8)))
