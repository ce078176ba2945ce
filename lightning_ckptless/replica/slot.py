"""A slot: a file in an arena, or anonymous memory in its place, that contains one version of one shard.

    offset 0                 header page: magic, length, crc32, JSON; padded to 4096 bytes
    offset 4096              bulk: the tensor state of the shard, mapped into memory
    offset 4096 + bulk       blob: the host state of the rank, any length

The header describes the data after it. It is set to `writing` before the first byte of data is modified, and written in
full last. A writer that dies in between leaves a header that no reader accepts as a replica. The bulk is mapped shared
and pre-faulted, because the first touch of a page costs ten times the copy into it.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from lightning_ckptless.errors import ArenaError
from lightning_ckptless.formats.schema import BYTES, SchemaError, record, text
from lightning_ckptless.formats.sealed import parse
from lightning_ckptless.protocol.slots import SlotEvent, SlotView, advance
from lightning_ckptless.protocol.versions import SlotState
from lightning_ckptless.replica.arena_space import SPACE_FIX
from lightning_ckptless.replica.slot_stamp import CHECKSUM, STAMP, Stamp, slot_state
from lightning_ckptless.system.memory_files import open_file

FORMAT = 4
HEADER_BYTES = 4096
_MAGIC = b"ckptless"
_quoted = json.encoder.encode_basestring_ascii
_SHARED = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
_PREFIX = struct.Struct("<8sHHI")
"""Magic, format number, length of the JSON in bytes, crc32 of the JSON."""


@dataclass(frozen=True)
class SlotHeader:
    """The first page of a slot.

    Args:
        run_id: run to which the slot belongs.
        stamp: what the slot contains.
        state: state of the slot.
        bulk_bytes: length of the tensor state.
        blob_bytes: length of the host state.
        checksum: checksum of both parts, as returned by `checksum.digest`.
    """

    run_id: str
    stamp: Stamp
    state: SlotState
    bulk_bytes: int
    blob_bytes: int = 0
    checksum: str = ""

    def encode(self) -> bytes:
        """The header as one page."""
        stamp, version = self.stamp, self.stamp.version
        # Not `json.dumps` of all fields: it takes several times as long, and a round writes half a dozen headers.
        body = (
            f'{{"blob_bytes":{self.blob_bytes},"bulk_bytes":{self.bulk_bytes},"checksum":{_quoted(self.checksum)},'
            f'"run_id":{_quoted(self.run_id)},"stamp":{{"generation":{stamp.generation},"holder":{stamp.holder},'
            f'"layout":{_quoted(stamp.layout)},"shard":{stamp.shard},"version":{{"optimizer_step":'
            f'{version.optimizer_step},"validation_done":{"true" if version.validation_done else "false"}}},'
            f'"world_size":{stamp.world_size}}},"state":"{self.state}"}}'
        ).encode()
        page = _PREFIX.pack(_MAGIC, FORMAT, len(body), zlib.crc32(body)) + body
        assert len(page) <= HEADER_BYTES, f"a slot header of {len(page)} bytes"
        return page.ljust(HEADER_BYTES, b"\0")

    @classmethod
    def decode(cls, page: bytes) -> SlotHeader | None:
        """The header in a page; None if the page is empty, damaged or of another format."""
        if len(page) < _PREFIX.size:
            return None
        magic, number, text_bytes, crc = _PREFIX.unpack_from(page)
        body = page[_PREFIX.size : _PREFIX.size + text_bytes]
        if magic != _MAGIC or number != FORMAT or len(body) != text_bytes or zlib.crc32(body) != crc:
            return None
        try:
            header: SlotHeader = _HEADER(parse(body), "")
        except SchemaError:
            return None
        return header if header.stamp.shard < header.stamp.world_size else None


_HEADER = record(
    SlotHeader,
    run_id=text(longest=HEADER_BYTES),
    stamp=STAMP,
    state=slot_state,
    bulk_bytes=BYTES,
    blob_bytes=BYTES,
    checksum=CHECKSUM,
)

_NAME = re.compile(r"shard-(\d+)\.held-by-(\d+)\.([^.]*)\.slot-(0|[1-9]\d{0,4})")
_TAG_CHARS = 12


@dataclass(frozen=True)
class SlotName:
    """The file name of a slot in its arena.

    Args:
        shard: index of the shard.
        holder: rank that keeps the copy.
        tag: first characters of the layout's digest, so that two layouts never share a file.
        index: position in the ring.
    """

    shard: int
    holder: int
    tag: str
    index: int

    @classmethod
    def of(cls, shard: int, holder: int, layout: str, index: int) -> SlotName:
        """The name of a slot written with a layout."""
        return cls(shard, holder, layout[:_TAG_CHARS], index)

    @classmethod
    def parse(cls, file_name: str) -> SlotName | None:
        """Parse the file name of a slot; None for other files."""
        found = _NAME.fullmatch(file_name)
        return found and cls(int(found[1]), int(found[2]), found[3], int(found[4]))

    @property
    def ring(self) -> tuple[int, int, str]:
        """The parts of the name that all slots of a ring share."""
        return self.shard, self.holder, self.tag

    def __str__(self) -> str:
        return f"shard-{self.shard:04d}.held-by-{self.holder:04d}.{self.tag}.slot-{self.index}"


def slot_file_bytes(bulk_bytes: int) -> int:
    """Length of a slot's file before the blob is written."""
    return HEADER_BYTES + bulk_bytes


def read_header(path: Path) -> SlotHeader | None:
    """The header of a slot's file; None if nothing was written yet.

    Raises:
        ArenaError: the header is torn, or describes more data than the file contains.
    """
    with _open_to_read(path) as file:
        page = file.read(HEADER_BYTES)
        file_bytes = os.fstat(file.fileno()).st_size
    if not any(page):
        return None
    header = SlotHeader.decode(page)
    if header is None or slot_file_bytes(header.bulk_bytes) + header.blob_bytes > file_bytes:
        raise ArenaError(f"{path}: the header is torn: its writer died or is still writing")
    return header


def read_bulk(path: Path, bulk_bytes: int) -> torch.Tensor:
    """The tensor state in a slot's file, mapped: uint8 of shape [bulk_bytes].

    torch has no read-only tensors, so the mapping is private: a stray write into it stays in this process.
    """
    with _open_to_read(path) as file:
        return _map(file.fileno(), bulk_bytes, access=mmap.ACCESS_COPY)


def read_blob(path: Path, bulk_bytes: int, blob_bytes: int) -> bytes:
    """The host state in a slot's file."""
    with _open_to_read(path) as file:
        file.seek(slot_file_bytes(bulk_bytes))
        return file.read(blob_bytes)


class Slot:
    """A slot, open for writing. One process writes a slot; any process may read it.

    Args:
        path: file of the slot; created and zero-filled if missing.
        run_id: run to which the slot belongs.
        bulk_bytes: length of the tensor state.

    Attributes:
        header: header of the slot; None if it is empty or torn.
        view: the header as the commit protocol sees it.
        bulk: the tensor state, uint8 of shape [bulk_bytes], shared with every process that maps the file.

    Raises:
        ArenaError: the file cannot be created, reserved or mapped.
    """

    def __init__(self, path: Path, run_id: str, bulk_bytes: int) -> None:
        self.path = path
        self.bulk_bytes = bulk_bytes
        self._run_id = run_id
        try:
            self._fd = open_file(path, os.O_RDWR | os.O_CREAT)
            try:
                # Without the reservation, a full file system would cause a SIGBUS at a later write instead of an error.
                os.posix_fallocate(self._fd, 0, slot_file_bytes(bulk_bytes))
                self.bulk = _map(self._fd, bulk_bytes, flags=_SHARED)
            except OSError:
                os.close(self._fd)
                raise
        except OSError as error:
            needed_bytes = slot_file_bytes(bulk_bytes)
            fix = f": {SPACE_FIX}" if error.errno == errno.ENOSPC else ""
            raise ArenaError(f"{path}: cannot reserve a slot of {needed_bytes} bytes: {error}{fix}") from error
        self.header = SlotHeader.decode(os.pread(self._fd, HEADER_BYTES, 0))
        self.view = _view_of(self.header)

    def begin(self, stamp: Stamp) -> None:
        """Invalidate the contents of the slot, which may be overwritten from now on."""
        state = self._after(SlotEvent.BEGIN, stamp)
        self._write_header(SlotHeader(self._run_id, stamp, state, self.bulk_bytes))

    def seal(self, stamp: Stamp, blob: bytes | memoryview, checksum: str) -> None:
        """Write the blob and mark the slot as staged.

        Args:
            stamp: the stamp passed to `begin`.
            blob: the host state.
            checksum: checksum of bulk and blob.
        """
        state = self._after(SlotEvent.SEAL, stamp)
        assert self.header is not None and self.header.stamp == stamp, f"{self.path}: sealed as {stamp}"
        _write_fully(self._fd, memoryview(blob), slot_file_bytes(self.bulk_bytes), self.path)
        self._write_header(SlotHeader(self._run_id, stamp, state, self.bulk_bytes, len(blob), checksum))

    def commit(self) -> None:
        """Mark the version as committed."""
        self._change(SlotEvent.COMMIT)

    def discard(self) -> None:
        """Mark the slot as empty: its version was not committed."""
        self._change(SlotEvent.DISCARD)

    def close(self) -> None:
        """Close the file. It stays mapped until the last view of `bulk` is released."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.bulk = torch.empty(0, dtype=torch.uint8)

    def _change(self, event: SlotEvent) -> None:
        old = self.header
        assert old is not None, f"{self.path}: event {event} in a slot without a header"
        state = self._after(event, old.stamp)
        self._write_header(SlotHeader(old.run_id, old.stamp, state, old.bulk_bytes, old.blob_bytes, old.checksum))

    def _after(self, event: SlotEvent, stamp: Stamp) -> SlotState:
        return advance(self.view.state, event, shard=stamp.shard, rank=stamp.holder, version=stamp.version)

    def _write_header(self, header: SlotHeader) -> None:
        _write_fully(self._fd, memoryview(header.encode()), 0, self.path)
        self.header, self.view = header, _view_of(header)


def _view_of(header: SlotHeader | None) -> SlotView:
    if header is None or header.state is SlotState.EMPTY:
        return SlotView()
    return SlotView(header.state, header.stamp.snapshot)


def _open_to_read(path: Path) -> BinaryIO:
    return os.fdopen(open_file(path, os.O_RDONLY), "rb")


def _map(fd: int, bulk_bytes: int, **how: int) -> torch.Tensor:
    if bulk_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    mapped = mmap.mmap(fd, slot_file_bytes(bulk_bytes), **how)
    return torch.frombuffer(mapped, dtype=torch.uint8, offset=HEADER_BYTES, count=bulk_bytes)


def _write_fully(fd: int, data: memoryview, offset: int, path: Path) -> None:
    try:
        while data:
            written = os.pwrite(fd, data, offset)
            data, offset = data[written:], offset + written
    except OSError as error:
        raise ArenaError(f"{path}: cannot write {len(data)} bytes at offset {offset}: {error}") from error
