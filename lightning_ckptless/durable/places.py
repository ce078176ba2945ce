"""Where each piece of a durable state is stored in its files.

torch.distributed.checkpoint stores the same in `.metadata`. As that is a pickle, we write it for other readers but
never read it.
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
from lightning_ckptless.formats.schema import BYTES, Check, SchemaError, optional, record, refused, sequence, text
from lightning_ckptless.formats.sealed import seal, unseal
from lightning_ckptless.internals.torch_internals import storage_place

FORMAT = 2
_NAME = "places.json"
_KIND = "places"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece is stored.

    Args:
        name: name of the tensor, or of the host state.
        offsets: offsets of the piece in the tensor; None for a host state.
        file: name of the file in the folder of the state.
        at: byte offset in the file.
        length: length in bytes.
    """

    name: str
    offsets: tuple[int, ...] | None
    file: str
    at: int
    length: int

    @property
    def index(self) -> MetadataIndex:
        """The key of the piece in torch.distributed.checkpoint."""
        return MetadataIndex(self.name, None if self.offsets is None else torch.Size(self.offsets))

    def to_result(self) -> WriteResult:
        """Rebuild the result that torch's writer returned for the piece."""
        return WriteResult(self.index, self.length, storage_place(self.file, self.at, self.length))


Places = Mapping[MetadataIndex, Place]
"""Places by their keys in torch.distributed.checkpoint."""


def places_of(results: Iterable[WriteResult]) -> list[Place]:
    """Return the places from the results of torch's writer."""
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
    """Convert places to JSON values."""
    return [list(astuple(place)) for place in places]


def _place(value: Any, path: str) -> Place:
    if type(value) is not list or len(value) != len(_FIELDS):
        raise refused(path, f"a list of {len(_FIELDS)} items", value)
    return Place(*(check(item, f"{path}.{name}") for (name, check), item in zip(_FIELDS.items(), value, strict=True)))


_FIELDS: dict[str, Check] = {
    "name": text(),
    "offsets": optional(sequence(BYTES, most=64)),
    "file": text(r"__\d+_\d+\.distcp"),
    "at": BYTES,
    "length": BYTES,
}
PLACES = sequence(_place)
"""Schema for the result of `to_json`."""


def write_places(folder: Path, places: Sequence[Place]) -> None:
    """Write the places of a state and sync them to disk.

    Raises:
        OSError: the file cannot be written.
    """
    write_synced(folder / _NAME, seal(_KIND, FORMAT, {"places": to_json(places)}))


def read_places(folder: Path) -> Places:
    """Read the places of a state.

    Raises:
        DurableError: the file is missing or damaged.
    """
    try:
        found = unseal((folder / _NAME).read_bytes(), _KIND, FORMAT, record(places=PLACES))["places"]
    except (OSError, SchemaError) as error:
        raise DurableError(f"{folder / _NAME}: {error}") from error
    return {place.index: place for place in found}
