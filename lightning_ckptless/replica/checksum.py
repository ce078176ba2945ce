"""Checksums of replicas.

A checksum is written as `algorithm:hexadecimal`, so that a reader can verify it without options; the empty string means
no checksum. If the first bytes have a known digest, it is `number of bytes=digest of them+digest of the rest`. If
several threads have computed it, it is `algorithm*bytes of a piece:digest of the pieces' digests`, which can be
verified with any number of threads.

xxh3 is about as fast as a memory copy. Like crc32, it releases the interpreter lock while it reads a large buffer, so
it can run concurrently with the training thread. It never runs in the training thread.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
PIECE_BYTES = 16 << 20
"""About two milliseconds of work for a thread."""


def digest(algorithm: str, parts: Sequence[Buffer], *, threads: int = 1) -> str:
    """Digest of several buffers as if they were one.

    Args:
        algorithm: `xxh3`, `crc32` or `none`.
        parts: the buffers, in order.
        threads: number of threads; with more than one, large buffers are divided into pieces.

    Returns:
        `algorithm:hexadecimal`, `algorithm*bytes of a piece:hexadecimal`, or the empty string for `none`.
    """
    if algorithm == NO_CHECKSUM:
        return ""
    if threads > 1 and sum(map(len, parts)) > PIECE_BYTES:
        return _of_pieces(algorithm, parts, PIECE_BYTES, threads)
    return f"{algorithm}:{_hexdigest(algorithm, parts)}"


def _hexdigest(algorithm: str, parts: Iterable[Buffer]) -> str:
    running = ALGORITHMS[algorithm]()
    for part in parts:
        running.update(part)
    return running.hexdigest()


def _of_pieces(algorithm: str, parts: Sequence[Buffer], piece_bytes: int, threads: int) -> str:
    pieces = _cut(parts, piece_bytes)
    # A new pool per digest: starting a thread takes little time, and no idle threads remain.
    with ThreadPoolExecutor(max(1, min(threads, len(pieces))), thread_name_prefix="ckptless-digest") as pool:
        found = list(pool.map(lambda piece: _hexdigest(algorithm, piece), pieces))
    return f"{algorithm}*{piece_bytes}:{_hexdigest(algorithm, [text.encode() for text in found])}"


def _cut(parts: Sequence[Buffer], piece_bytes: int) -> list[list[Buffer]]:
    """Divide buffers into pieces of equal length; a piece may span the end of one buffer and the start of the next."""
    pieces: list[list[Buffer]] = []
    left_bytes = 0
    for part in parts:
        rest = memoryview(part)
        while rest:
            if not left_bytes:
                pieces.append([])
                left_bytes = piece_bytes
            taken, rest = rest[:left_bytes], rest[left_bytes:]
            pieces[-1].append(taken)
            left_bytes -= len(taken)
    return pieces


def joined(first_bytes: int, first: str, rest: str) -> str:
    """The digest of buffers whose first bytes have a known digest.

    Args:
        first_bytes: number of those bytes.
        first: their digest.
        rest: digest of the remaining bytes.
    """
    return f"{first_bytes}={first}+{rest}" if first_bytes else rest


def matches(checksum: str, parts: Sequence[Buffer], *, threads: int = 1) -> bool:
    """Whether buffers match a checksum. True for the empty checksum, False for an unknown algorithm.

    Args:
        checksum: the checksum.
        parts: the buffers, in order.
        threads: number of threads that read them.
    """
    if not checksum:
        return True
    head, is_joined, rest = checksum.rpartition("+")
    if is_joined:
        first_bytes, _, first = head.partition("=")
        sides = _split(parts, int(first_bytes)) if first_bytes.isdigit() else None
        return (
            sides is not None and matches(first, sides[0], threads=threads) and matches(rest, sides[1], threads=threads)
        )
    algorithm, is_cut, piece_bytes = checksum.partition(":")[0].partition("*")
    if algorithm not in ALGORITHMS:
        return False
    if not is_cut:
        return digest(algorithm, parts) == checksum
    is_length = piece_bytes.isdigit() and int(piece_bytes) > 0
    return is_length and _of_pieces(algorithm, parts, int(piece_bytes), threads) == checksum


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


def in_place(tensor: torch.Tensor) -> torch.Tensor | None:
    """The bytes of a tensor as a flat uint8 tensor; None if they cannot be read without a copy."""
    if type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    if tensor.is_conj() or tensor.is_neg():
        # The stored bytes are not the values of a lazy conjugate or negation.
        return None
    return tensor.detach().reshape(-1).view(torch.uint8)
