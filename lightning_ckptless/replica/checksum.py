"""Digests that guard replicas.

A digest is written as `algorithm:hexadecimal`, so that a reader needs no option to check it; the empty string stands
for no digest. Where the first bytes have a digest of their own, which is known from before, it is
`number of bytes=digest of them+digest of the rest`. xxh3 is about as fast as a memory copy and, like crc32, gives
up the interpreter lock while it reads a large buffer: it may run beside the training thread, and never runs in it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import xxhash

Buffer = bytes | memoryview


class _Hash(Protocol):
    def update(self, data: Buffer, /) -> None: ...
    def hexdigest(self) -> str: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Buffer, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


ALGORITHMS: dict[str, Callable[[], _Hash]] = {"xxh3": xxhash.xxh3_128, "crc32": _Crc32}
NO_CHECKSUM = "none"


def digest(algorithm: str, parts: Iterable[Buffer]) -> str:
    """Digest of several buffers as if they were one.

    Args:
        algorithm: `xxh3`, `crc32` or `none`.
        parts: the buffers, in order.

    Returns:
        `algorithm:hexadecimal`, or the empty string for `none`.
    """
    if algorithm == NO_CHECKSUM:
        return ""
    running = ALGORITHMS[algorithm]()
    for part in parts:
        running.update(part)
    return f"{algorithm}:{running.hexdigest()}"


def joined(first_bytes: int, first: str, rest: str) -> str:
    """The digest of buffers whose first bytes have one of their own.

    Args:
        first_bytes: how many they are.
        first: their digest.
        rest: digest of all that follows.
    """
    return f"{first_bytes}={first}+{rest}" if first_bytes else rest


def matches(checksum: str, parts: Sequence[Buffer]) -> bool:
    """Whether buffers have a digest. True without one; False for an algorithm that is not known here."""
    if not checksum:
        return True
    head, is_joined, rest = checksum.rpartition("+")
    if is_joined:
        first_bytes, _, first = head.partition("=")
        sides = _split(parts, int(first_bytes)) if first_bytes.isdigit() else None
        return sides is not None and matches(first, sides[0]) and matches(rest, sides[1])
    algorithm = checksum.partition(":")[0]
    return algorithm in ALGORITHMS and digest(algorithm, parts) == checksum


def _split(parts: Sequence[Buffer], first_bytes: int) -> tuple[list[Buffer], list[Buffer]]:
    first: list[Buffer] = []
    rest: list[Buffer] = []
    for part in parts:
        first.append(memoryview(part)[:first_bytes])
        rest.append(memoryview(part)[first_bytes:])
        first_bytes = max(0, first_bytes - len(part))
    return first, rest


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a flat uint8 tensor in host memory, without a copy."""
    return tensor.numpy().data
