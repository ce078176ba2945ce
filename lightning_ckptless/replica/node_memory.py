"""Memory that the ranks of a node share: the cells of their ballots, and a place for what each of them sends to all.

It is a file in the arena's folder. The lowest rank of the node creates it under a name that is never used again, and
removes it when all have opened it. So a process of another generation has no way to it. A file that is left, because
the rank was killed in between, is removed with the arena.

The cells are mapped. Each line of them also says which process votes there.

Payloads are written and read as parts of the file, since their lengths are not known before: of each place, only what
was written takes memory. Every voter has two places, for rounds with an even and with an odd number, and writes its
payload before it casts its ballot. So the rule that no ballot is overwritten before all have read it
(`protocol/ballots.py`) holds for payloads as well. A processor that orders stores weakly may show a ballot before the
payload: a reader that finds another round or checksum reads again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import uuid
import zlib
from pathlib import Path

from lightning_ckptless.errors import ArenaError
from lightning_ckptless.formats.schema import text
from lightning_ckptless.protocol.ballots import BALLOTS_PER_LINE, CELLS_PER_LINE
from lightning_ckptless.replica.arena_owner import Owner
from lightning_ckptless.replica.arena_space import SPACE_FIX

MEMORY_NAME = text(r"votes-[0-9a-f]{32}")
"""The schema of the name of a file."""
_CELL = struct.Struct("=Q")
_TIME = struct.Struct("=d")
_HEAD = struct.Struct("=QQI")
"""The head of a payload: the number of the round, the length and a checksum."""
_CELL_BYTES = _CELL.size
_PLACE_BYTES = 1 << 30
_FIRST_BYTES = 1 << 14
"""How much of a payload is read together with its head."""
_MOST_READS = 10_000


class NodeMemory:
    """One process's access to the memory.

    Args:
        path: the file.
        voters: number of ranks of the node.

    Attributes:
        cells: the cells of all lines, 8 bytes each.

    Raises:
        OSError: the file does not exist any more, because the rank that has created it has exited or failed.
    """

    def __init__(self, path: Path, voters: int) -> None:
        self._file = open(path, "r+b", buffering=0, opener=_private)  # noqa: SIM115 - closed with this object
        self._map = mmap.mmap(self._file.fileno(), _cells_bytes(voters))
        self.cells = memoryview(self._map).cast("Q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def address(self, cell: int) -> int:
        """Where a cell is in this process."""
        return self._address + cell * _CELL_BYTES

    def introduce(self, line: int, process: Owner) -> None:
        """Say which process votes in a line."""
        pid, started_at = self._process_cells(line)
        self.cells[started_at] = _CELL.unpack(_TIME.pack(process.started_at))[0]
        self.cells[pid] = process.pid

    def process(self, line: int) -> Owner | None:
        """The process that votes in a line; None if it has not said so yet."""
        pid, started_at = (self.cells[cell] for cell in self._process_cells(line))
        return Owner(pid, _TIME.unpack(_CELL.pack(started_at))[0]) if pid and started_at else None

    @staticmethod
    def _process_cells(line: int) -> tuple[int, int]:
        return line * CELLS_PER_LINE + BALLOTS_PER_LINE, line * CELLS_PER_LINE + BALLOTS_PER_LINE + 1

    def write(self, line: int, number: int, payload: bytes) -> None:
        """Write the payload of a voter.

        Args:
            line: line of the voter.
            number: number of the round.
            payload: what it sends.

        Raises:
            ArenaError: the file system has no space for it.
        """
        data = memoryview(_HEAD.pack(number, len(payload), zlib.crc32(payload)) + payload)
        at = _place(line, number)
        assert len(data) <= _PLACE_BYTES, f"a payload of {len(payload)} bytes"
        try:
            while data:
                count = os.pwrite(self._file.fileno(), data, at)
                data, at = data[count:], at + count
        except OSError as error:
            raise ArenaError(
                f"cannot write {len(payload)} bytes into the memory that the ranks of this node share: {error}: "
                f"{SPACE_FIX}"
            ) from error

    def read(self, line: int, number: int) -> bytes:
        """Read the payload that a voter has written for a round.

        Raises:
            ArenaError: it is damaged.
        """
        at = _place(line, number)
        for _ in range(_MOST_READS):
            head = os.pread(self._file.fileno(), _FIRST_BYTES, at)
            found, length, checksum = _HEAD.unpack_from(head.ljust(_HEAD.size, b"\0"))
            payload = head[_HEAD.size : _HEAD.size + length]
            if found == number and length > len(payload):
                payload = os.pread(self._file.fileno(), length, at + _HEAD.size)
            if found == number and zlib.crc32(payload) == checksum:
                return payload
        raise ArenaError(f"the memory that the ranks of this node share is damaged in line {line}, round {number}")

    def close(self) -> None:
        """Release the memory. A thread that still uses it gets an error."""
        self.cells.release()
        self._map.close()
        self._file.close()


def make_memory(folder: Path, voters: int) -> Path:
    """Create the file for the ranks of a node.

    Args:
        folder: folder of the arena.
        voters: number of ranks of the node.

    Raises:
        ArenaError: the file cannot be created.
    """
    path = folder / f"votes-{uuid.uuid4().hex}"
    try:
        with open(path, "xb", opener=_private) as file:
            # Written rather than left sparse: a full file system refuses now, and not by a signal later.
            file.write(bytes(_cells_bytes(voters)))
    except OSError as error:
        raise ArenaError(f"{path}: cannot create the memory for votes: {error}: {SPACE_FIX}") from error
    return path


def _cells_bytes(voters: int) -> int:
    """The cells of all voters and of the announcement."""
    return (voters + 1) * CELLS_PER_LINE * _CELL_BYTES


def _place(line: int, number: int) -> int:
    return (1 + 2 * line + number % 2) * _PLACE_BYTES


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
