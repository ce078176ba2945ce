"""Where in the files of a durable state each piece of it lies.

torch.distributed.checkpoint keeps the same in `.metadata`, which is a pickle: we write that for other readers, and do
not read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from lightning_ckptless.durable.folder import write_synced
from lightning_ckptless.errors import DurableError
from lightning_ckptless.formats.schema import Check, SchemaError, optional, record, refused, sequence, text
from lightning_ckptless.formats.sealed import seal, unseal
from lightning_ckptless.internals.torch_internals import storage_place
from lightning_ckptless.replica.slot_stamp import BYTES

FORMAT = 1
_NAME = "places.json"
_KIND = "places"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece lies.

    Args:
        name: of the tensor, or of the host state.
        offsets: corner of the piece; None for a host state.
        file: in the folder of the state.
        at: byte offset in the file.
        length: in bytes.
    """

    name: str
    offsets: tuple[int, ...] | None
    file: str
    at: int
    length: int

    @property
    def index(self) -> MetadataIndex:
        """The piece as torch.distributed.checkpoint names it."""
        return MetadataIndex(self.name, None if self.offsets is None else torch.Size(self.offsets))

    def to_result(self) -> WriteResult:
        """What torch's writer said when it wrote the piece."""
        return WriteResult(self.index, self.length, storage_place(self.file, self.at, self.length))


Places = Mapping[MetadataIndex, Place]
"""By the piece, as torch.distributed.checkpoint names it."""


def places_of(results: Iterable[WriteResult]) -> list[Place]:
    """Where torch's writer has put what it wrote."""
    return [
        Place(
            name=result.index.fqn,
            offsets=None if result.index.offset is None else tuple(result.index.offset),
            file=result.storage_data.relative_path,
            at=result.storage_data.offset,
            length=result.storage_data.length,
        )
        for result in results
    ]


def to_json(places: Iterable[Place]) -> list[Any]:
    """Places as JSON has them."""
    return [list(astuple(place)) for place in places]


def _place(value: Any, place: str) -> Place:
    if type(value) is not list or len(value) != len(_FIELDS):
        raise refused(place, f"a list of {len(_FIELDS)} items", value)
    return Place(*(check(item, f"{place}.{name}") for (name, check), item in zip(_FIELDS.items(), value, strict=True)))


_FIELDS: dict[str, Check] = {
    "name": text(),
    "offsets": optional(sequence(BYTES, most=64)),
    "file": text(r"__\d+_\d+\.distcp"),
    "at": BYTES,
    "length": BYTES,
}
PLACES = sequence(_place)
"""The schema of what `to_json` made."""


def write_places(folder: Path, places: Sequence[Place]) -> None:
    """Write down where the pieces of a state lie, and wait until the disk has it.

    Raises:
        OSError: it cannot be written.
    """
    write_synced(folder / _NAME, seal(_KIND, FORMAT, {"places": to_json(places)}))


def read_places(folder: Path) -> Places:
    """Where the pieces of a state lie.

    Raises:
        DurableError: it is not there, or damaged.
    """
    try:
        found = unseal((folder / _NAME).read_bytes(), _KIND, FORMAT, record(places=PLACES))["places"]
    except (OSError, SchemaError) as error:
        raise DurableError(f"{folder / _NAME}: {error}") from error
    return {place.index: place for place in found}
